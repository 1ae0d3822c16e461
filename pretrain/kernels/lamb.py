"""LAMB over a flat buffer in two passes, with the collective of the norms between them.

The definition is `lamb_updates` and `take_updates` in `pretrain/optim/lamb.py`. The second pass computes each update
again from the moments, so none is stored. A program works on one block, which lies in one segment.

Shape letters: N elements of the buffer, G blocks, S segments, P parameters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pretrain.kernels.adamw import bias_correction, count, moved_moments, optional_inputs, rates, rounded

_BLOCK = 2048
_CHUNK = 256


class BlockTable(NamedTuple):
    """Where the blocks of a buffer are, on its device.

    Attributes:
        start_G, stop_G: int64, the elements of a block.
        parameter_G: int32, whose they are.
        first_S1: int32, the first block of each segment, and the end of the last.
        parameter_S: int32, the parameter of each segment.
    """

    start_G: Tensor
    stop_G: Tensor
    parameter_G: Tensor
    first_S1: Tensor
    parameter_S: Tensor


def block_table(starts: list[int], lengths: list[int], parameters: list[int], device: torch.device) -> BlockTable:
    """Cuts segments into blocks; none of them is empty."""
    start_S, length_S = torch.tensor(starts, dtype=torch.int64), torch.tensor(lengths, dtype=torch.int64)
    num_S = (length_S + _BLOCK - 1) // _BLOCK
    first_S1 = torch.cat([torch.zeros(1, dtype=torch.int64), num_S.cumsum(0)])
    segment_G = torch.repeat_interleave(torch.arange(len(starts)), num_S)
    start_G = start_S[segment_G] + _BLOCK * (torch.arange(len(segment_G)) - first_S1[segment_G])
    stop_G = torch.minimum(start_G + _BLOCK, (start_S + length_S)[segment_G])
    parameter_S = torch.tensor(parameters, dtype=torch.int64)
    small = (parameter_S[segment_G], first_S1, parameter_S)
    return BlockTable(start_G.to(device), stop_G.to(device), *(tensor.to(device, torch.int32) for tensor in small))


@triton.jit
def _update(w, m, v, correction1, correction2, weight_decay, eps):  # type: ignore[no-untyped-def]
    return (m / correction1) / (tl.sqrt_rn(v / correction2) + eps) + weight_decay * w


@triton.jit
def _moments(  # type: ignore[no-untyped-def]
    weight, gradient, exp_avg, exp_avg_sq, step, gradient_scale, skip, starts, stops, sums,
    rate1, beta2, rate2, log_beta1, log_beta2, weight_decay, eps,
    HAS_SCALE: tl.constexpr, HAS_SKIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    place = tl.load(starts + block) + tl.arange(0, BLOCK)
    is_taken = place < tl.load(stops + block)
    if HAS_SKIP:
        is_taken = is_taken & (tl.load(skip) == 0)
    number = tl.load(step)
    correction1, correction2 = bias_correction(number, log_beta1), bias_correction(number, log_beta2)
    g = tl.load(gradient + place, mask=is_taken, other=0.0).to(tl.float32)
    if HAS_SCALE:
        g = g * tl.load(gradient_scale)
    w = tl.load(weight + place, mask=is_taken, other=0.0)
    m = tl.load(exp_avg + place, mask=is_taken, other=0.0)
    v = tl.load(exp_avg_sq + place, mask=is_taken, other=0.0)
    m, v = moved_moments(g, m, v, rate1, beta2, rate2)
    tl.store(exp_avg + place, m, mask=is_taken)
    tl.store(exp_avg_sq + place, v, mask=is_taken)
    u = tl.where(is_taken, _update(w, m, v, correction1, correction2, weight_decay, eps), 0.0)
    tl.store(sums + 2 * block, tl.sum(w * w, axis=0))
    tl.store(sums + 2 * block + 1, tl.sum(u * u, axis=0))


@triton.jit
def _add_blocks(sums, firsts, parameters, squares, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    segment = tl.program_id(0)
    first, stop = tl.load(firsts + segment), tl.load(firsts + segment + 1)
    of_weight, of_update = tl.zeros([CHUNK], tl.float64), tl.zeros([CHUNK], tl.float64)
    for start in range(first, stop, CHUNK):
        block = start + tl.arange(0, CHUNK)
        of_weight += tl.load(sums + 2 * block, mask=block < stop, other=0.0).to(tl.float64)
        of_update += tl.load(sums + 2 * block + 1, mask=block < stop, other=0.0).to(tl.float64)
    parameter = tl.load(parameters + segment)
    tl.store(squares + 2 * parameter, tl.sum(of_weight, axis=0))
    tl.store(squares + 2 * parameter + 1, tl.sum(of_update, axis=0))


@triton.jit
def _weights(  # type: ignore[no-untyped-def]
    weight, exp_avg, exp_avg_sq, copy, step, skip, starts, stops, parameters, squares,
    lr, log_beta1, log_beta2, weight_decay, eps,
    HAS_COPY: tl.constexpr, HAS_SKIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    place = tl.load(starts + block) + tl.arange(0, BLOCK)
    is_taken = place < tl.load(stops + block)
    if HAS_SKIP:
        is_taken = is_taken & (tl.load(skip) == 0)
    parameter = tl.load(parameters + block)
    weight_norm = tl.sqrt(tl.load(squares + 2 * parameter))
    update_norm = tl.sqrt(tl.load(squares + 2 * parameter + 1))
    is_defined = (weight_norm > 0) & (update_norm > 0)
    ratio = tl.where(is_defined, weight_norm / tl.where(is_defined, update_norm, 1.0), 1.0)
    number = tl.load(step)
    correction1, correction2 = bias_correction(number, log_beta1), bias_correction(number, log_beta2)
    w = tl.load(weight + place, mask=is_taken, other=0.0)
    m = tl.load(exp_avg + place, mask=is_taken, other=0.0)
    v = tl.load(exp_avg_sq + place, mask=is_taken, other=0.0)
    w = w - (ratio * lr).to(tl.float32) * _update(w, m, v, correction1, correction2, weight_decay, eps)
    tl.store(weight + place, w, mask=is_taken)
    if HAS_COPY:
        tl.store(copy + place, rounded(w, copy.dtype.element_ty), mask=is_taken)


def fused_moments(
    weight_N: Tensor,
    gradient_N: Tensor,
    exp_avg_N: Tensor,
    exp_avg_sq_N: Tensor,
    step: Tensor,
    squares_P2: Tensor,
    table: BlockTable,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    gradient_scale: Tensor | None,
    skip: Tensor | None,
) -> None:
    """The first half of a step: counts it, updates the moments, writes each parameter's squares to `squares_P2`."""
    count(step, skip)
    num_blocks, num_segments = len(table.start_G), len(table.parameter_S)
    if num_blocks == 0:
        return
    sums_G2 = torch.empty(num_blocks, 2, device=weight_N.device)
    optional = optional_inputs(weight_N, None, gradient_scale, skip)
    _moments[(num_blocks,)](
        weight_N,
        gradient_N,
        exp_avg_N,
        exp_avg_sq_N,
        step,
        optional["gradient_scale"],
        optional["skip"],
        table.start_G,
        table.stop_G,
        sums_G2,
        **rates(betas),
        weight_decay=weight_decay,
        eps=eps,
        HAS_SCALE=optional["HAS_SCALE"],
        HAS_SKIP=optional["HAS_SKIP"],
        BLOCK=_BLOCK,
        num_warps=8,
    )
    _add_blocks[(num_segments,)](sums_G2, table.first_S1, table.parameter_S, squares_P2, CHUNK=_CHUNK)


def fused_weights(
    weight_N: Tensor,
    exp_avg_N: Tensor,
    exp_avg_sq_N: Tensor,
    step: Tensor,
    copy_N: Tensor | None,
    squares_P2: Tensor,
    table: BlockTable,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    skip: Tensor | None,
) -> None:
    """The second half: takes the step of each parameter by the ratio of its norms over all ranks."""
    num_blocks = len(table.start_G)
    if num_blocks == 0:
        return
    optional = optional_inputs(weight_N, copy_N, None, skip)
    logarithms = rates(betas)
    _weights[(num_blocks,)](
        weight_N,
        exp_avg_N,
        exp_avg_sq_N,
        optional["copy"],
        step,
        optional["skip"],
        table.start_G,
        table.stop_G,
        table.parameter_G,
        squares_P2,
        lr=lr,
        log_beta1=logarithms["log_beta1"],
        log_beta2=logarithms["log_beta2"],
        weight_decay=weight_decay,
        eps=eps,
        HAS_COPY=optional["HAS_COPY"],
        HAS_SKIP=optional["HAS_SKIP"],
        BLOCK=_BLOCK,
        num_warps=8,
    )
