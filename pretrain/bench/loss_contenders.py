"""Ways to compute the contrastive loss and its gradients, each measured in a process of its own.

Shape letters: B rows, L tokens per row, T = B * L tokens, D hidden, K negatives, C = 1 + K candidates, A anchors of a
chunk.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pretrain.bench.contest import peak_bytes, versions
from pretrain.bench.step_contenders import authors_loss
from pretrain.objectives.taco import sample_pairs, token_contrastive_loss

CONTENDERS = ("taco", "triton", "chunked", "authors")
WINDOW, TEMPERATURE, SEED = 2, 0.07, 1
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CHUNK_BYTES = 64 << 20  # of gathered candidates; a quarter and four times as much took longer on a CPU


class Inputs(NamedTuple):
    """A micro-batch: h and e, and its pairs, drawn beforehand."""

    hidden_BLD: Tensor
    embedding_BLD: Tensor
    positive_BL: Tensor
    negative_BLK: Tensor


def measure(contender: str, shape: dict[str, Any], threads: int, repeats: int) -> dict[str, Any]:
    """Seconds of drawing pairs and of loss and gradients, bytes that the latter added at its peak, and the loss."""
    torch.set_num_threads(threads)
    device = torch.device(shape["device"])
    inputs = make_inputs(shape, device)
    draw = _drawing(contender, shape, device)
    compute = _computation(contender, shape, inputs)
    compute(0)  # sets up the allocator, thread pools and kernels
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device.type == "cuda" else _resident_bytes()
    seconds = [_time(compute, number, device) for number in range(repeats)]
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_bytes()
    draw(0)
    return {
        "loss_seconds": seconds,
        "pairs_seconds": [_time(draw, number, device) for number in range(repeats)],
        "added_bytes": max(0, peak - before),
        "loss": float(compute(0)),
        "device_name": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(),
        "versions": versions("torch"),
    }


def make_inputs(shape: dict[str, Any], device: torch.device) -> Inputs:
    """The same for every contender."""
    generator = torch.Generator().manual_seed(0)
    size = shape["rows"], shape["seq_length"], shape["hidden_size"]
    dtype = _DTYPES[shape["precision"]]
    hidden_BLD, embedding_BLD = (
        torch.randn(size, generator=generator).to(device, dtype).requires_grad_() for _ in "he"
    )
    return Inputs(hidden_BLD, embedding_BLD, *_sample(shape, device, 0))


def _sample(shape: dict[str, Any], device: torch.device, micro_batch_index: int) -> tuple[Tensor, Tensor]:
    valid_BL = torch.ones(shape["rows"], shape["seq_length"], dtype=torch.bool, device=device)
    return sample_pairs(
        valid_BL,
        window=WINDOW,
        num_negatives=shape["num_negatives"],
        seed=SEED,
        micro_batch_index=micro_batch_index,
    )


def _drawing(contender: str, shape: dict[str, Any], device: torch.device) -> Callable[[int], object]:
    """Draws the pairs of a micro-batch. In training Triton's loss draws its own, which its time contains."""
    if contender != "triton":
        return lambda number: _sample(shape, device, number)
    from pretrain.kernels.pairs import draw_pairs

    valid_BL = torch.ones(shape["rows"], shape["seq_length"], dtype=torch.bool, device=device)
    return lambda number: draw_pairs(
        valid_BL, window=WINDOW, num_negatives=shape["num_negatives"], seed=SEED, micro_batch_index=number
    )


def _computation(contender: str, shape: dict[str, Any], inputs: Inputs) -> Callable[[int], Tensor]:
    """Computes the loss and both gradients, and returns the loss; micro-batch 0 has the pairs of `inputs`."""

    def run(loss: Tensor) -> Tensor:
        torch.autograd.grad(loss, inputs[:2])
        return loss.detach()

    if contender == "taco":
        return lambda _: run(token_contrastive_loss(*inputs, temperature=TEMPERATURE))
    if contender == "authors":
        return lambda _: run(authors_loss(*inputs, TEMPERATURE))
    if contender == "chunked":
        return lambda _: chunked(inputs)[0]
    from pretrain.kernels.contrast import drawn_contrastive_loss
    from pretrain.kernels.pairs import pair_key

    device = inputs.hidden_BLD.device
    valid_BL = torch.ones(inputs.positive_BL.shape, dtype=torch.bool, device=device)
    segment_BL = valid_BL.long()

    def draw_and_compute(number: int) -> Tensor:
        return run(
            drawn_contrastive_loss(
                inputs.hidden_BLD.flatten(0, 1),
                inputs.embedding_BLD.flatten(0, 1),
                valid_BL,
                segment_BL,
                valid_BL,
                pair_key(SEED, number, device),
                window=WINDOW,
                num_negatives=shape["num_negatives"],
                temperature=TEMPERATURE,
            )
        )

    return draw_and_compute


@torch.no_grad()
def chunked(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of h and e, with the candidates gathered for some anchors at a time; all pairs must exist."""
    length, size = inputs.hidden_BLD.shape[1:]
    unit_TD = (inputs.hidden_BLD.float() - inputs.embedding_BLD.float()).flatten(0, 1)
    inverse_norm_T1 = 1 / torch.linalg.vector_norm(unit_TD, dim=-1, keepdim=True)
    unit_TD.mul_(inverse_norm_T1)
    first_B1 = torch.arange(len(inputs.positive_BL), device=unit_TD.device)[:, None] * length
    candidate_TC = torch.cat([(first_B1 + inputs.positive_BL)[..., None], inputs.negative_BLK], dim=-1).flatten(0, 1)
    gradient_TD = torch.empty_like(unit_TD)
    loss = unit_TD.new_zeros(())
    step = max(1, _CHUNK_BYTES // (candidate_TC.shape[1] * size * unit_TD.element_size()))
    for start in range(0, len(unit_TD), step):
        rows = slice(start, start + step)
        gathered_ACD = unit_TD[candidate_TC[rows]]
        logit_AC = torch.einsum("ad,acd->ac", unit_TD[rows], gathered_ACD) / TEMPERATURE
        loss += (logit_AC.logsumexp(dim=-1) - logit_AC[:, 0]).sum()
        slope_AC = logit_AC.softmax(dim=-1)
        slope_AC[:, 0] -= 1
        pull_AD = torch.einsum("ac,acd->ad", slope_AC, gathered_ACD)
        pull_AD -= unit_TD[rows] * (unit_TD[rows] * pull_AD).sum(dim=-1, keepdim=True)
        gradient_TD[rows] = pull_AD * inverse_norm_T1[rows] / (TEMPERATURE * len(unit_TD))
    gradient_BLD = gradient_TD.view_as(inputs.hidden_BLD).to(inputs.hidden_BLD.dtype)
    return loss / len(unit_TD), gradient_BLD, -gradient_BLD


def _time(run: Callable[[int], object], number: int, device: torch.device) -> float:
    """Seconds of one call: CPU time of all threads, or on a GPU those until the work that it queued is done."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    run(number)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def _resident_bytes() -> int:
    """Memory of this process now; its peak where the system does not say."""
    status = Path("/proc/self/status")
    return int(status.read_text().partition("VmRSS:")[2].split()[0]) * 1024 if status.exists() else peak_bytes()
