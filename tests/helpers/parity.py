"""Five steps of training in a layout and in one plain process, and how far they end from each other.

The plain process knows nothing of DeepSpeed: a loop over micro-batches, `clip_grad_norm_`, AdamW or LAMB. Clipping is
active in every step, so scaling, averaging and clipping must all be right for the figures to agree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from math import inf
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from forked import run_ranks
from layouts import SETTING, SETTINGS, Case, Grid
from small_runs import write_small_run

from pretrain.config.deepspeed import zero_stage
from pretrain.config.load import load_config
from pretrain.config.sections import RunConfig
from pretrain.data.batches import Batch, BatchSource, RowSource
from pretrain.engine.engine import Engine
from pretrain.engine.pipelined import PipelinedEngine
from pretrain.engine.plain import PlainEngine
from pretrain.model import layers as model_layers
from pretrain.model import pretraining
from pretrain.model.build import build_model
from pretrain.optim import Lamb, learning_rate, parameter_groups
from pretrain.parallel import collectives
from pretrain.parallel.launch import choose_device, make_deterministic, read_launch, start_process_group
from pretrain.parallel.mesh import Mesh, start_mesh

STEPS = 5
EVALUATED = 1000

Figures = list[tuple[float, float, float, float]]
"""Loss, MLM loss, contrastive loss and gradient norm of each step; then those of an evaluation, see `evaluate`."""
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Outcome:
    """What one rank, or the plain process, found: weights are whole, but only those of its pipeline stage."""

    figures: Figures
    weights: Weights
    pairs: dict[int, str]
    """Number of the micro-batch -> hash of its positives and negatives."""
    num_attentions: int
    """How often an encoder layer ran in training, recomputing included."""


@dataclass(frozen=True)
class Deviation:
    """The largest of all ranks and steps, or the largest that is allowed.

    Relative for losses and gradient norm; absolute for weights, and beside it the root of their mean square deviation
    relative to that of their way from the initial weights.
    """

    other: float
    """Of the total loss, and of the evaluation's accuracy."""
    mlm_loss: float
    contrastive_loss: float
    grad_norm: float
    weights: float
    weights_of_way: float

    def is_within(self, limits: Deviation) -> bool:
        """True where nothing is larger than its limit."""
        return all(found <= limit for found, limit in zip(astuple(self), astuple(limits), strict=True))


@dataclass(frozen=True)
class References:
    """What layouts are compared with: the plain process in each setting, and for bf16 one process of the engine."""

    plain: dict[str, Outcome]
    in_bf16: Outcome
    initial: Weights

    def of(self, case: Case) -> Outcome:
        """The one that belongs to a case."""
        return self.in_bf16 if case.precision == "bf16" else self.plain[case.setting]


TOLERANCE = 1e-5
# bf16 keeps 8 bits of a number, and g = h - e is a small difference of large ones at the start of training. What is
# rounded differs between layouts, and Adam turns a gradient of nothing but rounding into a step. A guess that tips
# over changes the accuracy by a tenth.
LIMITS = {
    "fp32": Deviation(TOLERANCE, TOLERANCE, TOLERANCE, TOLERANCE, TOLERANCE, 1e-4),
    "bf16": Deviation(inf, 0.01, 0.05, 0.15, 0.02, 0.4),
}


def load(folder: Path, *overrides: str) -> RunConfig:
    """A small run in `folder` whose weights can be compared.

    Adam divides by the size of the gradient: with its usual eps, one that is nothing but rounding, as that of the keys'
    biases is, becomes a full step, and what rounding gives depends on the processor.
    """
    return load_config(write_small_run(folder), ("optim.eps=1e-4", *overrides))


def build(config: RunConfig, mesh: Mesh | None = None) -> tuple[Any, BatchSource]:
    rows = RowSource(config.data.train, config.data.row_mode, config.data.seq_length)
    source = BatchSource(
        rows,
        micro_batch_size=config.train.micro_batch_size,
        seed=config.run.seed,
        mask_rate=config.objective.mask_rate,
        masking=config.objective.masking,
        mean_span_length=config.objective.mean_span_length,
        exclude_special=config.objective.exclude_special,
        shuffle=True,
    )
    return build_model(config, rows.tokenizer.vocab_size, mesh or Mesh(0, 1)), source


# -- the plain process -------------------------------------------------------------------------------------------------


def plain_process(config: RunConfig) -> tuple[Figures, Weights]:
    """The reference: no DeepSpeed, no process group."""
    model, source = build(config)
    model.train()
    optim, per_step = config.optim, config.train.global_batch_size // config.train.micro_batch_size
    groups = parameter_groups(model, optim.weight_decay)
    kind: Any = Lamb if optim.name == "lamb" else torch.optim.AdamW
    optimizer = kind(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
    figures: Figures = []
    for step in range(STEPS):
        indices = range(step * per_step, (step + 1) * per_step)
        losses = [model(*tensors(source.micro_batch(index))) for index in indices]
        total, mlm, contrastive = average(losses, config)
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, optim, config.train.steps)
        optimizer.step()
        optimizer.zero_grad()
        figures.append((float(total), float(mlm), float(contrastive), float(norm)))
    model.eval()
    with torch.no_grad():
        losses = model(*tensors(source.micro_batch(EVALUATED)))
    accuracy = losses.num_correct / losses.num_labels
    figures.append((float(accuracy), float(losses.mlm), float(losses.contrastive), 1.0))
    return figures, _weights_of(model)


def average(losses: Sequence[pretraining.PretrainingLosses], config: RunConfig) -> tuple[torch.Tensor, ...]:
    """Total, MLM and contrastive loss of a step from those of its micro-batches, as docs/objective.md says."""
    contrastive = torch.stack([part.contrastive for part in losses]).mean()
    # Only the total has the gradient of the contrastive loss.
    weighted_contrastive = torch.stack([part.total - part.mlm for part in losses]).mean()
    if config.mlm.average == "token":
        mlm = torch.stack([part.mlm * part.num_labels for part in losses]).sum()
        mlm = mlm / torch.stack([part.num_labels for part in losses]).sum()
    else:
        mlm = torch.stack([part.mlm for part in losses]).mean()
    return mlm + weighted_contrastive, mlm, contrastive


def tensors(batch: Batch) -> tuple[Any, ...]:
    arrays = (batch.input_ids_BL, batch.segment_BL, batch.valid_BL, batch.masked_index_M, batch.masked_label_M)
    return (*(torch.from_numpy(array) for array in arrays), batch.micro_batch_index)


def find_references(folder: Path) -> References:
    """Train the plain process in each setting."""
    plain = plain_outcomes(folder, tuple(SETTINGS))
    ((in_bf16,),) = layout_outcomes(folder, [Case(Grid(), precision="bf16")])
    return References(plain, in_bf16, initial_weights(folder))


def plain_outcomes(folder: Path, settings: Sequence[str]) -> dict[str, Outcome]:
    """What the plain process finds in each of some settings."""
    configs = [load(folder, *SETTING, *SETTINGS[name]) for name in settings]
    return dict(zip(settings, run_ranks(1, _plain_outcomes, configs)[0], strict=True))


def initial_weights(folder: Path) -> Weights:
    """Where all of them start."""
    model, _ = build(load(folder, *SETTING))
    return _weights_of(model)


def _plain_outcomes(configs: Sequence[RunConfig]) -> list[Outcome]:
    return [_observe(lambda config=config: plain_process(config)) for config in configs]  # type: ignore[misc]


# -- the engine in a layout --------------------------------------------------------------------------------------------


def layout_outcomes(folder: Path, cases: Sequence[Case], overrides: Sequence[str] = ()) -> list[list[Outcome]]:
    """What every rank finds in each of the cases, which share one grid: `[case][rank]`."""
    configs = [load(folder, *case.overrides, *overrides) for case in cases]
    by_rank = run_ranks(cases[0].grid.num_processes, train_all, configs, timeout=280)
    return [list(outcomes) for outcomes in zip(*by_rank, strict=True)]


def train_all(configs: Sequence[RunConfig]) -> list[Outcome]:
    """One rank, training by each configuration from the start."""
    mesh = join_mesh(configs[0])
    return [_observe(lambda config=config: train_on(mesh, config)) for config in configs]  # type: ignore[misc]


def train(config: RunConfig) -> tuple[Figures, Weights]:
    """One rank of one run: its figures, and the whole final weights of all stages."""
    figures, weights = train_on(join_mesh(config), config)
    return figures, {name: weight for stage in collectives.gather_objects(weights) for name, weight in stage.items()}


def join_mesh(config: RunConfig) -> Mesh:
    """Meet the other ranks."""
    device = device_of(config)
    if config.train.deterministic:
        make_deterministic()
    start_process_group(read_launch(), device)
    return start_mesh(config.parallel, device)


def device_of(config: RunConfig) -> torch.device:
    """Where this rank trains: the CPU, unless the case is moved to a GPU."""
    return choose_device(config.run.device, read_launch())


def train_on(mesh: Mesh, config: RunConfig) -> tuple[Figures, Weights]:
    """One rank of the real engine: figures of the steps and of an evaluation, and whole final weights of its stage."""
    model, source = build(config, mesh)
    engine = (PlainEngine if mesh.pp_size == 1 else PipelinedEngine)(config, model, device_of(config), mesh)
    figures = take_steps(engine, source, 0, STEPS)
    figures.append(evaluate(engine, source))
    return figures, whole_weights(engine, mesh)


def take_steps(engine: Engine, source: BatchSource, first: int, last: int) -> Figures:
    """Figures of the optimizer steps from `first` to the one before `last` (0-based), on this rank's micro-batches."""
    config, mesh = engine.config, engine.mesh
    per_step = config.train.global_batch_size // config.train.micro_batch_size
    figures: Figures = []
    for step in range(first, last):
        share = range(step * per_step + mesh.dp_rank, (step + 1) * per_step, mesh.dp_size)
        result = engine.train_step(
            [source.micro_batch(index) for index in share],
            learning_rate=learning_rate(step, config.optim, config.train.steps),
        )
        figures.append((result.loss, result.mlm_loss, result.contrastive_loss, result.grad_norm))
    return figures


def evaluate(engine: Engine, source: BatchSource) -> tuple[float, float, float, float]:
    """Accuracy and both losses on one micro-batch, and a 1 that makes it as long as a step's figures."""
    found = engine.evaluate([source.micro_batch(EVALUATED)])
    return found.accuracy, found.mlm_loss, found.contrastive_loss, 1.0


def whole_weights(engine: Engine, mesh: Mesh) -> Weights:
    """fp32 weights of this rank's stage, put together over the tensor-parallel ranks."""
    from deepspeed.utils import safe_get_full_fp32_param

    weights: Weights = {}
    for name, parameter in engine.engine.module.named_parameters():
        if zero_stage(engine.config) == 0:
            part = parameter.detach().clone()
        else:
            part = safe_get_full_fp32_param(parameter).clone()
            part = part.view(getattr(parameter, "ds_shape", parameter.shape))
        if mesh.tensor_group is not None and getattr(parameter, "tensor_model_parallel", False):
            parts = [torch.empty_like(part) for _ in range(mesh.tp_size)]
            distributed.all_gather(parts, part.contiguous(), group=mesh.tensor_group)
            part = torch.cat(parts, dim=parameter.partition_dim)
        weights[name] = _words_only(parameter, part).cpu()
    return weights


def _weights_of(model: torch.nn.Module) -> Weights:
    return {name: _words_only(parameter, parameter.detach()).clone() for name, parameter in model.named_parameters()}


def _words_only(parameter: torch.nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
    """Without the rows that stand for no word, of which there are different numbers in other layouts."""
    assert not whole[getattr(parameter, "num_words", len(whole)) :].any(), "an unused row is not 0"
    return whole[: getattr(parameter, "num_words", len(whole))]


# -- watching ----------------------------------------------------------------------------------------------------------


def _observe(work: Callable[[], tuple[Figures, Weights]]) -> Outcome:
    pairs: dict[int, str] = {}
    attentions: list[None] = []
    with (
        _watched(pretraining, "sample_pairs", lambda found, call: pairs.update(_hash_pairs(found, call))),
        _watched(model_layers, "self_attention", lambda *_: attentions.append(None)),
    ):
        figures, weights = work()
    return Outcome(figures, weights, pairs, len(attentions))


@contextmanager
def _watched(module: Any, name: str, tell: Callable[[Any, dict[str, Any]], None]) -> Iterator[None]:
    """Tell of every call of a function: its result and its named arguments."""
    original = getattr(module, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        tell(result, kwargs)
        return result

    setattr(module, name, call)
    try:
        yield
    finally:
        setattr(module, name, original)


def _hash_pairs(found: tuple[torch.Tensor, torch.Tensor], call: dict[str, Any]) -> dict[int, str]:
    digest = hashlib.sha256(b"".join(pairs.cpu().numpy().tobytes() for pairs in found)).hexdigest()
    return {call["micro_batch_index"]: digest}


# -- comparing ---------------------------------------------------------------------------------------------------------


def deviation(found: Figures, expected: Figures) -> float:
    """The largest relative difference of any figure; absolute where the expected one is zero."""
    return max(_relative(found, expected))


def compare(ranks: Sequence[Outcome], expected: Outcome, initial: Weights) -> Deviation:
    """How far the ranks of a layout are from `expected`.

    Raises:
        AssertionError: parameters are missing, or have another name or shape.
    """
    assert {name for rank in ranks for name in rank.weights} == expected.weights.keys()
    figures = [_relative(rank.figures, expected.figures) for rank in ranks]
    kinds = (max(values) for values in zip(*figures, strict=True))
    deviations = [_weight_deviation(rank.weights, expected.weights, initial) for rank in ranks]
    return Deviation(*kinds, *(max(values) for values in zip(*deviations, strict=True)))


def _weight_deviation(found: Weights, expected: Weights, initial: Weights) -> tuple[float, float]:
    """The largest, and the root mean square relative to that of the way from the initial weights."""
    assert all(found[name].shape == expected[name].shape for name in found)
    off = torch.cat([(found[name] - expected[name]).flatten() for name in found])
    way = torch.cat([(expected[name] - initial[name]).flatten() for name in found])
    return float(off.abs().max()), float(off.norm() / way.norm())


def draw_same_pairs(ranks: Sequence[Outcome], expected: Outcome) -> bool:
    """True where no rank drew other pairs for a micro-batch than the plain process, and all were drawn."""
    drawn = {index for rank in ranks for index in rank.pairs}
    return drawn == expected.pairs.keys() and all(rank.pairs.items() <= expected.pairs.items() for rank in ranks)


def _relative(found: Figures, expected: Figures) -> list[float]:
    """The largest relative difference of each kind of figure; absolute where the expected one is zero."""
    kinds = zip(zip(*found, strict=True), zip(*expected, strict=True), strict=True)
    return [max(abs(a - b) / (abs(b) or 1.0) for a, b in zip(x, y, strict=True)) for x, y in kinds]
