"""Dropout + residual + LayerNorm in Triton; `add_norm.py` says what is computed, and its twin defines it.

Forward: one program per token on a GPU. Backward: each program takes every P-th token and sums the gradients of weight
and bias in its registers; P sums [2, D] are added afterwards. Which token goes to which program depends only on the
number of multiprocessors, so a device repeats its own bits.

Shape letters: R tokens that a program takes at once.
"""

# ruff: noqa: N803  # constants of a kernel have capitals

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pretrain.kernels.dropout_mask import BLOCK_SIZE, HiddenDropout, drop_threshold, keep_scale
from pretrain.kernels.philox import keep_lines, rows_per_program


# The number of tokens differs from micro-batch to micro-batch: no kernel of its own for one that 16 divides.
@triton.jit(do_not_specialize=["first_line", "num_lines"])
def _forward(
    hidden, residual, weight, bias, out, rstd, words, line_of, first_line, num_lines, threshold, scale, eps,
    WIDTH: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, DROPS: tl.constexpr,
    HAS_LINES: tl.constexpr,
):  # fmt: skip
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row_R = row_R < num_lines
    column = tl.arange(0, BLOCK)[:, None] * 8 + tl.arange(0, 8)[None, :]
    is_inside = (column < WIDTH)[None, :, :] & is_row_R[:, None, None]
    place = row_R[:, None, None] * WIDTH + column[None, :, :]
    value = tl.load(hidden + place, mask=is_inside, other=0.0).to(tl.float32)
    if DROPS:
        line_R = tl.load(line_of + row_R, mask=is_row_R, other=0) if HAS_LINES else row_R + first_line
        value = tl.where(keep_lines(words, line_R, threshold, NUM_BLOCKS, BLOCK), value * scale, 0.0)
    value += tl.load(residual + place, mask=is_inside, other=0.0).to(tl.float32)
    mean_R = tl.sum(tl.sum(value, 2), 1) / WIDTH
    value = tl.where(is_inside, value - mean_R[:, None, None], 0.0)
    inverse_R = 1.0 / tl.sqrt(tl.sum(tl.sum(value * value, 2), 1) / WIDTH + eps)
    factor = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    value = value * inverse_R[:, None, None] * factor[None, :, :] + shift[None, :, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=is_inside)
    tl.store(rstd + row_R, inverse_R, mask=is_row_R)


@triton.jit(do_not_specialize=["first_line", "num_lines"])
def _backward(
    grad, out, rstd, weight, bias, grad_hidden, grad_residual, sums, words, line_of, first_line, num_lines, threshold,
    scale,
    WIDTH: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, DROPS: tl.constexpr,
    HAS_LINES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    step = tl.num_programs(0) * ROWS
    column = tl.arange(0, BLOCK)[:, None] * 8 + tl.arange(0, 8)[None, :]
    factor = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    inverse_factor = tl.where(factor == 0.0, 0.0, 1.0 / tl.where(factor == 0.0, 1.0, factor))
    weight_sum = tl.zeros([BLOCK, 8], tl.float32)
    bias_sum = tl.zeros([BLOCK, 8], tl.float32)
    row_R = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    for _ in range(tl.cdiv(num_lines - program * ROWS, step)):
        is_row_R = row_R < num_lines
        is_inside = (column < WIDTH)[None, :, :] & is_row_R[:, None, None]
        place = row_R[:, None, None] * WIDTH + column[None, :, :]
        slope = tl.load(grad + place, mask=is_inside, other=0.0).to(tl.float32)
        value = tl.load(out + place, mask=is_inside, other=0.0).to(tl.float32)
        normal = tl.where(is_inside, (value - shift[None, :, :]) * inverse_factor[None, :, :], 0.0)
        weight_sum += tl.sum(slope * normal, 0)
        bias_sum += tl.sum(slope, 0)
        slope *= factor[None, :, :]
        mean_R = tl.sum(tl.sum(slope, 2), 1) / WIDTH
        along_R = tl.sum(tl.sum(slope * normal, 2), 1) / WIDTH
        inverse_R = tl.load(rstd + row_R, mask=is_row_R, other=0.0)
        total = (slope - mean_R[:, None, None] - normal * along_R[:, None, None]) * inverse_R[:, None, None]
        tl.store(grad_residual + place, total.to(grad_residual.dtype.element_ty), mask=is_inside)
        if DROPS:
            line_R = tl.load(line_of + row_R, mask=is_row_R, other=0) if HAS_LINES else row_R + first_line
            total = tl.where(keep_lines(words, line_R, threshold, NUM_BLOCKS, BLOCK), total * scale, 0.0)
            tl.store(grad_hidden + place, total.to(grad_hidden.dtype.element_ty), mask=is_inside)
        row_R += step
    place_of_sums = sums + program.to(tl.int64) * (2 * WIDTH) + column
    tl.store(place_of_sums, weight_sum, mask=column < WIDTH)
    tl.store(place_of_sums + WIDTH, bias_sum, mask=column < WIDTH)


def forward_triton(
    hidden_ND: Tensor, residual_ND: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float, drop: HiddenDropout | None
) -> tuple[Tensor, Tensor]:
    """As `add_norm.forward_twin`; statistics in fp32."""
    out_ND = torch.empty_like(hidden_ND)
    rstd_N = hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32)
    if len(hidden_ND) > 0:
        rows = rows_per_program(hidden_ND.device, len(hidden_ND))
        words, lines, first_line, threshold, scale, constants = _place(drop, weight_D, hidden_ND.shape[1], rows)
        _forward[(triton.cdiv(len(hidden_ND), rows),)](
            hidden_ND,
            residual_ND,
            weight_D,
            bias_D,
            out_ND,
            rstd_N,
            words,
            lines,
            first_line,
            len(hidden_ND),
            threshold,
            scale,
            eps,
            *constants,
        )
    return out_ND, rstd_N


def backward_triton(
    grad_ND: Tensor, out_ND: Tensor, rstd_N: Tensor, weight_D: Tensor, bias_D: Tensor, drop: HiddenDropout | None
) -> tuple[Tensor, ...]:
    """As `add_norm.backward_twin`."""
    num_lines, width = grad_ND.shape
    grad_residual_ND = torch.empty_like(grad_ND)
    grad_hidden_ND = grad_residual_ND if drop is None else torch.empty_like(grad_ND)
    rows = rows_per_program(grad_ND.device, num_lines)
    num_programs = min(triton.cdiv(num_lines, rows), _num_programs(grad_ND.device))
    sums_P2D = torch.empty(num_programs, 2, width, dtype=torch.float32, device=grad_ND.device)
    if num_lines > 0:
        words, lines, first_line, threshold, scale, constants = _place(drop, weight_D, width, rows)
        _backward[(num_programs,)](
            grad_ND,
            out_ND,
            rstd_N,
            weight_D,
            bias_D,
            grad_hidden_ND,
            grad_residual_ND,
            sums_P2D,
            words,
            lines,
            first_line,
            num_lines,
            threshold,
            scale,
            *constants,
        )
    grad_weight_D, grad_bias_D = sums_P2D.sum(dim=0)
    return grad_hidden_ND, grad_residual_ND, grad_weight_D.to(weight_D.dtype), grad_bias_D.to(bias_D.dtype)


def _place(drop: HiddenDropout | None, unused: Tensor, width: int, rows: int) -> tuple[Any, ...]:
    """Words, numbers of the lines, number of the first one, threshold, scale; the kernels' constants."""
    num_blocks = -(-width // BLOCK_SIZE)
    constants = (width, num_blocks, triton.next_power_of_2(num_blocks), rows)
    if drop is None:
        return unused, unused, 0, 0, 1.0, (*constants, False, False)
    threshold = drop_threshold(drop.probability)
    lines = drop.words if drop.line_N is None else drop.line_N
    return (
        drop.words,
        lines,
        drop.first_line,
        threshold,
        keep_scale(threshold),
        (
            *constants,
            True,
            drop.line_N is not None,
        ),
    )


def _num_programs(device: torch.device) -> int:
    """Programs of the backward pass: four for each multiprocessor."""
    if device.type != "cuda":
        return 4
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count
