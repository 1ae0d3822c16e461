"""The contenders of `taco bench step`, each measured in this process: ours, and Hugging Face's BERT in two versions."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.bench.contest import peak_bytes, versions

if TYPE_CHECKING:
    import numpy as np
    import torch

    from pretrain.config.sections import RunConfig
    from pretrain.data.batches import Batch

CONTENDERS = ("taco", "mlm", "peer", "peer_best")
OURS = ("taco", "mlm")
VOCAB_SIZE = 30_522
SPECIAL_IDS = 1000  # bert-base-uncased keeps its special and unused entries below


@dataclass(frozen=True)
class Shape:
    """What every contender computes, and with what; `settings` (`section.key=value`) are for ours alone."""

    rows: int = 16
    seq_length: int = 256
    num_layers: int = 4
    hidden_size: int = 512
    num_negatives: int = 50
    dropout: float = 0.1
    row_mode: str = "stream"
    device: str = "cpu"
    precision: str = "fp32"
    peer_compile: bool = False
    settings: tuple[str, ...] = ()

    def as_options(self) -> list[str]:
        """The same as options of `taco bench step`."""
        options = []
        for field in dataclasses.fields(self):
            value, name = getattr(self, field.name), f"--{field.name.replace('_', '-')}"
            if field.name == "settings":
                options += [f"--set={setting}" for setting in value]
            elif isinstance(value, bool):
                options += [name] if value else []
            else:
                options.append(f"{name}={value}")
        return options


def config_of(shape: Shape, *, is_contrastive: bool, world_size: int = 1) -> RunConfig:
    """The configuration of our engine on `world_size` ranks.

    Raises:
        ConfigError: a setting is wrong; names it.
    """
    from pretrain.config.load import resolve_config

    tree = {
        "run": {"output_dir": "unused", "device": shape.device},
        "data": {"train": ["unused"], "seq_length": shape.seq_length, "row_mode": shape.row_mode},
        "model": {
            "num_layers": shape.num_layers,
            "hidden_size": shape.hidden_size,
            "num_attention_heads": shape.hidden_size // 64,
            "ffn_hidden_size": 4 * shape.hidden_size,
            "hidden_dropout": shape.dropout,
            "attention_dropout": shape.dropout,
            "max_position_embeddings": max(512, shape.seq_length),
        },
        "objective": {"num_negatives": shape.num_negatives, "contrastive_weight": float(is_contrastive)},
        "train": {"micro_batch_size": shape.rows, "global_batch_size": shape.rows},
        "precision": shape.precision,
    }
    return resolve_config(Path("taco bench step"), tree, shape.settings, world_size=world_size)


def measure(
    contender: str,
    shape: Shape,
    *,
    threads: int,
    steps: int,
    profile: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Figures of one contender: seconds of each step, peak memory, operations; JSON types.

    Args:
        profile: look at one more step with torch's profiler; on a GPU its summary is always taken.
    """
    import torch

    from pretrain.bench.step_profile import profile_step

    torch.set_num_threads(threads)
    config = config_of(shape, is_contrastive=contender != "mlm")
    device = _start(config)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    say("building")
    # The first steps set up the allocator, optimizer state, thread pools and kernels; a GPU also settles its clock.
    num_warm_up = 1 if device.type == "cpu" else 4
    # Beforehand: a run prepares its rows in a thread.
    batches = [_held_for(device, random_batch(config, number, VOCAB_SIZE)) for number in range(num_warm_up + steps)]
    if contender in OURS:
        run_step, parts_of = _ours(config, device)
    else:
        run_step, parts_of = _peer(config, device, shape, batches[0], is_best=contender == "peer_best"), dict
    say("warming up")
    for batch in batches[:num_warm_up]:
        _time(run_step, batch, device)
    parts_of()
    say("timing")
    seconds = [_time(run_step, batch, device) for batch in batches[num_warm_up:]]
    parts = parts_of()
    answer = {
        "seconds": seconds,
        "peak_bytes": peak_bytes() if device.type == "cpu" else torch.cuda.max_memory_allocated(device),
        "device_name": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "versions": versions("torch", "deepspeed", "transformers"),
        **_work(config, batches[num_warm_up:]),
        **({"parts": parts} if parts else {}),
    }
    if profile or device.type == "cuda":
        say("profiling")
        answer["profile"] = profile_step(lambda: run_step(batches[-1]), device)
    return answer


def _work(config: RunConfig, batches: Sequence[Batch]) -> dict[str, float]:
    """What a step computes on average: operations, places and real tokens."""
    from pretrain.planner.flops import add_counts, count_rows, step_flops

    by_document = config.data.row_mode == "pack"
    counts = add_counts(count_rows(b.segment_BL, b.masked_label_M, by_document=by_document) for b in batches)
    flops = step_flops(config, VOCAB_SIZE, counts)
    totals = {"model_flops": flops.model, "hardware_flops": flops.hardware, "real_tokens": counts.tokens}
    return {name: total / len(batches) for name, total in totals.items()}


def _start(config: RunConfig) -> torch.device:
    """The device of every contender; tells DeepSpeed which one to use before it is imported."""
    import os

    from torch import distributed

    from pretrain.parallel.launch import Launch, choose_device, start_process_group

    launch = Launch(0, 1, 0, 1)
    device = choose_device(config.run.device, launch)
    os.environ["DS_ACCELERATOR"] = device.type
    if not distributed.is_initialized():
        start_process_group(launch, device)
    return device


def _held_for(device: torch.device, batch: Batch) -> Batch:
    """The batch in page-locked memory if a GPU reads it, as in a run."""
    if device.type == "cpu":
        return batch
    import torch

    from pretrain.data.batches import Batch

    def held(array: np.ndarray) -> np.ndarray:
        return torch.from_numpy(array).pin_memory().numpy()

    return Batch(
        held(batch.input_ids_BL),
        held(batch.segment_BL),
        held(batch.valid_BL),
        held(batch.masked_index_M),
        held(batch.masked_label_M),
        batch.micro_batch_index,
    )


def _time(run_step: Callable[[Batch], None], batch: Batch, device: torch.device) -> float:
    """Seconds of one step, with the work that it queued on the GPU."""
    import torch

    start = time.perf_counter()
    run_step(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


# -- the rows ----------------------------------------------------------------------------------------------------------


def random_batch(config: RunConfig, index: int, vocab_size: int) -> Batch:
    """A masked micro-batch of random words, the same for every contender, in the shape of `data.row_mode`.

    Documents of `document`, `sentence` and `pack` rows have lognormal lengths, half a row in the median.
    """
    import numpy as np

    from pretrain.data.batches import Batch
    from pretrain.data.masking import predictions_per_row

    generator = np.random.default_rng(index)
    rows, length = config.train.micro_batch_size, config.data.seq_length
    segment_BL = _segments(generator, config.data.row_mode, rows, length)
    is_token_BL = segment_BL > 0
    ids_BL = generator.integers(min(SPECIAL_IDS, vocab_size // 2), vocab_size, (rows, length)) * is_token_BL
    per_row = predictions_per_row(config.objective.mask_rate, length - 2)
    # A share of the tokens between the first and the last one of each row, in random places.
    order_BL = np.where(is_token_BL, generator.random((rows, length)), 2.0)
    order_BL[:, 0] = 2.0
    order_BL[np.arange(rows), is_token_BL.sum(axis=1) - 1] = 2.0
    places_BP = np.argsort(order_BL, axis=1)[:, :per_row]
    wanted_B = np.round(config.objective.mask_rate * (is_token_BL.sum(axis=1) - 2)).clip(1, per_row)
    places_BP = np.sort(np.where(np.arange(per_row) < wanted_B[:, None], places_BP, length), axis=1)
    is_used_M = (places_BP < length).ravel()
    index_M = np.where(is_used_M, (places_BP + np.arange(rows)[:, None] * length).ravel(), 0)
    label_M = np.where(is_used_M, ids_BL.ravel()[index_M], -100)
    ids_BL.ravel()[index_M[is_used_M]] = min(103, vocab_size - 1)  # [MASK]
    return Batch(ids_BL, segment_BL, is_token_BL, index_M, label_M, index)


def _segments(generator: np.random.Generator, row_mode: str, rows: int, length: int) -> np.ndarray:
    import numpy as np

    if row_mode == "stream":
        return np.ones((rows, length), np.int64)
    lengths = np.clip(generator.lognormal(np.log(length / 2), 0.6, (rows, length)), 8, length).astype(np.int64)
    place_L = np.arange(length)
    if row_mode != "pack":
        return (place_L < lengths[:, :1]).astype(np.int64)
    ends = np.cumsum(lengths, axis=1)
    segment_BL = 1 + (place_L[None, :, None] >= ends[:, None, :8]).sum(axis=2)
    last_B = (ends <= length).sum(axis=1).clip(1)  # a document that does not fit begins another row
    return np.where(segment_BL <= last_B[:, None], segment_BL, 0)


# -- ours --------------------------------------------------------------------------------------------------------------


def _ours(config: RunConfig, device: torch.device) -> tuple[Callable[[Batch], None], Callable[[], dict[str, float]]]:
    """A step of our engine, and what takes the seconds of the parts of its steps."""
    from pretrain.engine.plain import PlainEngine
    from pretrain.model.build import build_model
    from pretrain.model.pretraining import BertForPretraining
    from pretrain.parallel.mesh import Mesh

    mesh = Mesh(dp_rank=0, dp_size=1)
    model = build_model(config, VOCAB_SIZE, mesh, device)
    assert isinstance(model, BertForPretraining)
    engine = PlainEngine(config, model, device, mesh)

    def run_step(batch: Batch) -> None:
        engine.heartbeat.begin_step(batch.micro_batch_index + 1)
        engine.train_step([batch], learning_rate=config.optim.lr)
        engine.heartbeat.end_step()

    def parts_of() -> dict[str, float]:
        times = engine.step_clock.take()
        return {} if times is None else {str(part): seconds for part, seconds in times.parts.items()}

    return run_step, parts_of


# -- Hugging Face ------------------------------------------------------------------------------------------------------


def _peer(
    config: RunConfig, device: torch.device, shape: Shape, first: Batch, *, is_best: bool
) -> Callable[[Batch], None]:
    """A step of transformers' BERT with the authors' loss, as it comes or with its own best settings.

    At its best: SDPA, the vocabulary head on masked positions alone, on a GPU bf16 weights (which train worse than
    fp32 ones under autocast) and torch.compile. Pairs are drawn beforehand, untimed, in both.
    """
    import torch

    from pretrain.objectives.taco import sample_pairs

    model = _peer_model(config, device, is_best=is_best)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.lr, weight_decay=0.01, fused=True)
    objective = config.objective
    pairs = sample_pairs(
        torch.from_numpy(first.valid_BL).to(device),
        window=objective.positive_window,
        num_negatives=objective.num_negatives,
        seed=1,
        micro_batch_index=0,
        segment_BL=torch.from_numpy(first.segment_BL).to(device),
    )
    losses = _best_losses(model) if is_best else _plain_losses(model)

    def loss_of(*inputs: torch.Tensor | None) -> torch.Tensor:
        mlm, hidden_BLD, embedding_BLD = losses(*inputs)
        return mlm + authors_loss(hidden_BLD, embedding_BLD, *pairs, objective.temperature)

    if is_best and (device.type == "cuda" or shape.peer_compile):
        loss_of = torch.compile(loss_of)
    in_16_bits = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16" and not is_best)
    is_padded = config.data.row_mode != "stream"

    def run_step(batch: Batch) -> None:
        # Rows with padding are the same in each step, for the pairs were drawn for them.
        batch = first if is_padded else batch
        mask_BL = torch.from_numpy(batch.valid_BL).to(device) if is_padded else None
        arrays = (batch.input_ids_BL, batch.masked_index_M, batch.masked_label_M)
        ids_BL, index_M, label_M = (torch.from_numpy(array).to(device, non_blocking=True) for array in arrays)
        with in_16_bits:
            loss = loss_of(ids_BL, mask_BL, index_M, label_M)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return run_step


def _peer_model(config: RunConfig, device: torch.device, *, is_best: bool) -> Any:
    import torch
    from transformers import BertConfig, BertForMaskedLM

    from pretrain.model.hf import hf_config

    torch.manual_seed(1)
    settings = hf_config(config.model, VOCAB_SIZE)
    model: Any = BertForMaskedLM(BertConfig(**settings, **({"attn_implementation": "sdpa"} if is_best else {})))
    if is_best and config.precision == "bf16":
        model = model.to(torch.bfloat16)
    return model.train().to(device)


def _plain_losses(model: Any) -> Callable[..., Any]:
    import torch

    def losses(ids_BL: Any, mask_BL: Any, index_M: Any, label_M: Any) -> Any:
        labels_BL = torch.full_like(ids_BL, -100)
        used_M = label_M >= 0
        labels_BL.view(-1)[index_M[used_M]] = label_M[used_M]
        outputs = model(input_ids=ids_BL, attention_mask=mask_BL, labels=labels_BL, output_hidden_states=True)
        return outputs.loss, outputs.hidden_states[-1], outputs.hidden_states[0]

    return losses


def _best_losses(model: Any) -> Callable[..., Any]:
    from torch.nn import functional

    def losses(ids_BL: Any, mask_BL: Any, index_M: Any, label_M: Any) -> Any:
        # Not `labels=`, with which BertForMaskedLM predicts every position.
        outputs = model.bert(input_ids=ids_BL, attention_mask=mask_BL, output_hidden_states=True)
        hidden_BLD = outputs.last_hidden_state
        logits_MV = model.cls(hidden_BLD.flatten(0, 1)[index_M])
        return functional.cross_entropy(logits_MV.float(), label_M), hidden_BLD, outputs.hidden_states[0]

    return losses


def authors_loss(
    hidden_BLD: torch.Tensor,
    embedding_BLD: torch.Tensor,
    positive_BL: torch.Tensor,
    negative_BLK: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """The TACO loss as its authors compute it, every candidate of every token at once, but out of place; a scalar."""
    import torch
    from torch.nn import functional

    semantics_BLD = hidden_BLD - embedding_BLD
    row_B1 = torch.arange(len(semantics_BLD), device=semantics_BLD.device)[:, None]
    positives_BL1D = semantics_BLD[row_B1, positive_BL].unsqueeze(2)
    negatives_BLKD = semantics_BLD.flatten(0, 1)[negative_BLK]
    candidates = torch.cat([positives_BL1D, negatives_BLKD], dim=2).detach()
    logits = functional.cosine_similarity(semantics_BLD.unsqueeze(2), candidates, dim=-1) / temperature
    nearest = torch.zeros(positive_BL.numel(), dtype=torch.int64, device=logits.device)
    return functional.cross_entropy(logits.flatten(0, 1), nearest)
