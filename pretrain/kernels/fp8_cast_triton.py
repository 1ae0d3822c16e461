"""Rounding to FP8 in Triton; `fp8_cast.py` has the plain twin that defines it.

Two kernels: the largest magnitude of each of a few hundred parts, and the cast, in which every program first finds the
largest of all. So nothing waits for the host, and the tensor is read twice and written once in each order.

Shape letters: N rows, F features, Q = N rounded up to a multiple of 16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_PARTS = 512
_BLOCK = 4096
_TILE = 64


def cast_to_fp8(
    value_NF: Tensor, dtype: torch.dtype, *, rows: bool, num_columns: int | None, smallest: float
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """The fields of `fp8_cast.Fp8`; the transpose, if it is wanted, has `num_columns` columns."""
    value_NF = value_NF.contiguous()
    num_rows, num_features = value_NF.shape
    rows_NF = torch.empty_like(value_NF, dtype=dtype) if rows else None
    columns_FQ = None if num_columns is None else value_NF.new_empty(num_features, num_columns, dtype=dtype)
    num_parts = max(1, min(_PARTS, triton.cdiv(value_NF.numel(), _BLOCK)))
    largest_P = value_NF.new_empty(num_parts, dtype=torch.float32)
    scale = value_NF.new_empty((), dtype=torch.float32)
    _find_largest[(num_parts,)](value_NF, value_NF.numel(), largest_P, num_parts, BLOCK=_BLOCK, num_warps=8)
    grid = (max(1, triton.cdiv(num_columns or num_rows, _TILE)), triton.cdiv(num_features, _TILE))
    _cast[grid](
        value_NF,
        largest_P,
        num_parts,
        rows_NF,
        columns_FQ,
        scale,
        num_rows,
        num_features,
        num_columns or 0,
        LIMIT=torch.finfo(dtype).max,
        SMALLEST=smallest,
        PARTS=triton.next_power_of_2(num_parts),
        TILE=_TILE,
        num_warps=4,
    )
    return rows_NF, columns_FQ, scale


@triton.jit
def _find_largest(values, num_values, largest, num_parts, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each program the largest magnitude of every `num_parts`-th block."""
    part = tl.program_id(0)
    found = tl.zeros([BLOCK], tl.float32)
    for block in range(part, tl.cdiv(num_values, BLOCK), num_parts):
        place = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        found = tl.maximum(found, tl.abs(tl.load(values + place, mask=place < num_values, other=0.0).to(tl.float32)))
    tl.store(largest + part, tl.max(found, axis=0))


# The number of rows differs from micro-batch to micro-batch: no kernel of its own for one that 16 divides.
@triton.jit(do_not_specialize=["num_rows"])
def _cast(  # type: ignore[no-untyped-def]
    values,
    largest,
    num_parts,
    by_row,
    by_column,
    scale_out,
    num_rows,
    num_features,
    num_columns,
    LIMIT: tl.constexpr,
    SMALLEST: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """A tile per program, in one or both orders."""
    part = tl.arange(0, PARTS)
    peak = tl.max(tl.load(largest + part, mask=part < num_parts, other=0.0), axis=0)
    scale = tl.maximum(peak, SMALLEST) / LIMIT
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(scale_out, scale)
    row = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)[:, None]
    feature = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)[None, :]
    is_value = (row < num_rows) & (feature < num_features)
    value = tl.load(values + row * num_features + feature, mask=is_value, other=0.0).to(tl.float32) / scale
    # Comparisons, because a minimum may drop a NaN.
    value = tl.where(value > LIMIT, LIMIT, value)
    value = tl.where(value < -LIMIT, -LIMIT, value)
    if by_row is not None:
        tl.store(by_row + row * num_features + feature, value.to(by_row.dtype.element_ty), mask=is_value)
    if by_column is not None:
        is_inside = (row < num_columns) & (feature < num_features)
        tl.store(by_column + feature * num_columns + row, value.to(by_column.dtype.element_ty), mask=is_inside)
