"""What a rank really holds, in bytes, against the formulas of ZeRO; and tensors that must never exist.

Every tensor that Python can reach is counted once by its storage. N are the parameters that a rank would hold without
ZeRO (tensor parallelism has divided them already), D the data-parallel ranks (Rajbhandari et al. 2020, section 5).
DeepSpeed keeps a second fp32 copy of its share of the weights as master weights under ZeRO-1, 2 and 3, in fp32 too.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_ranks
from parity import build, load, tensors
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.config.sections import RunConfig
from pretrain.engine.engine import Engine
from pretrain.engine.pipelined import PipelinedEngine
from pretrain.engine.plain import PlainEngine
from pretrain.model.build import build_model
from pretrain.parallel.launch import read_launch, start_process_group
from pretrain.parallel.mesh import start_mesh
from pretrain.planner.vocabulary import padded_vocab_size

pytestmark = pytest.mark.slow

# Large matrices and small buckets, so that nothing but weights, gradients and optimizer state weighs much. ZeRO-3 keeps
# parameters below 100,000 elements gathered; here, as in every BERT of use, only biases and LayerNorms are so small.
SIZES = (
    "model.hidden_size=512",
    "model.ffn_hidden_size=2048",
    "model.num_layers=2",
)
LAYOUTS = {
    "DP2": (2,),
    "TP2 x DP2": (4, "parallel.tensor=2"),
    "TP2 + SP x DP2": (4, "parallel.tensor=2", "parallel.sequence=true"),
}
CASES = [(stage, layout) for layout in ("DP2", "TP2 x DP2") for stage in range(4)] + [(2, "TP2 + SP x DP2")]


def sizes(stage: int) -> tuple[str, ...]:
    """Overrides of a run of that ZeRO stage."""
    buckets = {
        "zero.reduce_bucket_size=20000": stage > 0,
        "zero.allgather_bucket_size=20000": stage in (1, 2),
    }
    return (*SIZES, f"zero.stage={stage}", *(override for override, is_read in buckets.items() if is_read))


SLACK = 1.02
"""What a rank may hold beside it: buckets, a batch, the small parameters that ZeRO-3 keeps gathered."""


@pytest.fixture(scope="module", autouse=True)
def _import_megatron_once() -> None:
    import megatron.core.tensor_parallel  # noqa: F401  # before the ranks fork


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("memory")


def live_bytes() -> int:
    """Bytes of all storages of tensors that are reachable."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor) and item.device.type == "cpu":
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@contextmanager
def counted_before_update(engine: Engine, counts: list[int]) -> Iterator[None]:
    """Append the live bytes when all gradients of a step are there."""
    update = engine.engine._take_model_step

    def count_and_update(*args: Any, **kwargs: Any) -> None:
        counts.append(live_bytes())
        update(*args, **kwargs)

    engine.engine._take_model_step = count_and_update
    yield
    engine.engine._take_model_step = update


@dataclass(frozen=True)
class Held:
    """N, D, elements of the largest parameter; live bytes with the gradients of the second step, and after it."""

    num_parameters: int
    dp_size: int
    largest: int
    with_gradients: int
    after: int


def measure(config: RunConfig) -> Held:
    """One rank of two steps."""
    device = torch.device("cpu")
    start_process_group(read_launch(), device)
    mesh = start_mesh(config.parallel, device)
    before = live_bytes()
    model, source = build(config, mesh)
    sizes = [parameter.numel() for parameter in model.parameters()]
    engine = (PlainEngine if mesh.pp_size == 1 else PipelinedEngine)(config, model, device, mesh)
    del model
    counts: list[int] = []
    with counted_before_update(engine, counts):
        for step in range(2):
            share = range(4 * step + mesh.dp_rank, 4 * step + 4, mesh.dp_size)
            engine.train_step([source.micro_batch(index) for index in share], learning_rate=1e-3)
    return Held(sum(sizes), mesh.dp_size, max(sizes), counts[1] - before, live_bytes() - before)


def bytes_per_parameter(stage: int, precision: str, dp_size: int) -> tuple[float, float]:
    """Weights, master weights and moments of one of N parameters on one rank; and its gradient, while it is there."""
    weight = 4 if precision == "fp32" else 2
    if stage == 0:
        return weight + 8, weight
    state = 12 / dp_size  # master weight and two moments in fp32
    if stage == 3:  # the buffer of the gradients stays
        return 2 * weight / dp_size + state, 0
    return weight + state, weight if stage == 1 else weight / dp_size


@pytest.mark.parametrize(("stage", "layout"), CASES)
def test_a_rank_holds_what_zero_says_and_nothing_else(stage: int, layout: str, folder: Path) -> None:
    world_size, *overrides = LAYOUTS[layout]
    check(run_ranks(world_size, measure, load(folder, *sizes(stage), *overrides)), stage, "fp32")


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.soak) for stage in (1, 2)), 3])
def test_bf16_halves_weights_and_gradients(stage: int, folder: Path) -> None:
    config = load(folder, *sizes(stage), "precision=bf16")
    check(run_ranks(2, measure, config), stage, "bf16")


@pytest.mark.parametrize("overrides", [(2, "parallel.pipeline=2"), (4, "parallel.pipeline=2", "parallel.tensor=2")])
def test_a_stage_holds_its_own_layers_only(overrides: tuple[Any, ...], folder: Path) -> None:
    world_size, *layout = overrides
    config = load(folder, *sizes(1), *layout)
    results = run_ranks(world_size, measure, config)
    # DeepSpeed keeps what travels between stages, h and e of every micro-batch under way, and their gradients.
    tokens = config.train.micro_batch_size * config.data.seq_length
    check(results, 1, "fp32", beside=4 * (2 * 2 * tokens * config.model.hidden_size) * 4)
    whole = run_ranks(1, measure, load(folder, *sizes(1)))[0].num_parameters
    # Both stages keep the word matrix, and positions and head are not split.
    assert max(result.num_parameters for result in results) < 0.6 * whole / (world_size // 2)


def check(results: list[Held], stage: int, precision: str, beside: int = 0) -> None:
    for held in results:
        state, gradient = bytes_per_parameter(stage, precision, held.dp_size)
        expected = state * held.num_parameters
        assert expected <= held.after <= SLACK * expected + beside
        # ZeRO-2 frees whole gradients: a rank keeps those of the parameters at both ends of its share.
        ends = 2 * held.largest * gradient * held.dp_size if stage == 2 else 0
        assert held.with_gradients <= SLACK * (expected + gradient * held.num_parameters) + ends + beside


class LargestTensor(TorchDispatchMode):
    """Elements and shape of the largest tensor that any operation has made."""

    def __init__(self) -> None:
        super().__init__()
        self.found: tuple[int, tuple[int, ...]] = (0, ())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, torch.Tensor):
                self.found = max(self.found, (item.numel(), tuple(item.shape)))
        return result


VOCABULARY, NEGATIVES = 5000, 200


def largest_tensor(config: RunConfig) -> tuple[int, tuple[int, ...]]:
    """One rank: forward and backward of a micro-batch with a large vocabulary and many negatives."""
    device = torch.device("cpu")
    start_process_group(read_launch(), device)
    mesh = start_mesh(config.parallel, device)
    _, source = build(config, mesh)
    model = build_model(config, VOCABULARY, mesh)
    model.train()
    with LargestTensor() as largest:
        losses = model(*tensors(source.micro_batch(0)))
        losses.total.backward()
    return largest.found


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_neither_all_logits_nor_all_negatives_ever_exist(tensor: int, folder: Path) -> None:
    config = load(folder, f"objective.num_negatives={NEGATIVES}", f"parallel.tensor={tensor}")
    tokens = config.train.micro_batch_size * config.data.seq_length
    word_matrix = padded_vocab_size(VOCABULARY, tensor) // tensor * config.model.hidden_size
    # What must not exist is larger by far than the largest that must: the word matrix, and its gradient.
    assert tokens * VOCABULARY // tensor > 2 * word_matrix
    assert tokens * NEGATIVES * config.model.hidden_size > 2 * word_matrix
    for size, shape in run_ranks(tensor, largest_tensor, config):
        assert size <= word_matrix, shape
