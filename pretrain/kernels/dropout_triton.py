"""Dropout alone in Triton: one program per token on a GPU. See `dropout.py`."""

# ruff: noqa: N803  # constants of a kernel have capitals

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pretrain.kernels.dropout_mask import BLOCK_SIZE, HiddenDropout, drop_threshold, keep_scale
from pretrain.kernels.philox import keep_lines, rows_per_program


# The number of tokens differs from micro-batch to micro-batch: no kernel of its own for one that 16 divides.
@triton.jit(do_not_specialize=["first_line", "num_lines"])
def _drop(
    hidden, out, words, line_of, first_line, num_lines, threshold, scale,
    WIDTH: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, HAS_LINES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[:, None] * 8 + tl.arange(0, 8)[None, :]
    is_inside = (column < WIDTH)[None, :, :] & (row_R < num_lines)[:, None, None]
    place = row_R[:, None, None] * WIDTH + column[None, :, :]
    line_R = tl.load(line_of + row_R, mask=row_R < num_lines, other=0) if HAS_LINES else row_R + first_line
    value = tl.load(hidden + place, mask=is_inside, other=0.0).to(tl.float32)
    value = tl.where(keep_lines(words, line_R, threshold, NUM_BLOCKS, BLOCK), value * scale, 0.0)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=is_inside)


def drop_triton(hidden_ND: Tensor, drop: HiddenDropout) -> Tensor:
    """`hidden_ND`, contiguous, with what drops set to 0 and the rest scaled up in fp32."""
    num_lines, width = hidden_ND.shape
    out_ND = torch.empty_like(hidden_ND)
    threshold, num_blocks = drop_threshold(drop.probability), -(-width // BLOCK_SIZE)
    rows = rows_per_program(hidden_ND.device, num_lines)
    if num_lines > 0:
        _drop[(triton.cdiv(num_lines, rows),)](
            hidden_ND,
            out_ND,
            drop.words,
            drop.words if drop.line_N is None else drop.line_N,
            drop.first_line,
            num_lines,
            threshold,
            keep_scale(threshold),
            width,
            num_blocks,
            triton.next_power_of_2(num_blocks),
            drop.line_N is not None,
            rows,
        )
    return out_ND
