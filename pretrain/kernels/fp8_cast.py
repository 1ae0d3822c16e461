"""Rounds a matrix to FP8 with one scale for all of it: the twin in torch, and the choice between it and Triton.

The scale maps the largest magnitude to the largest number of the format (dynamic scaling, as in Micikevicius et al.
2022, "FP8 Formats for Deep Learning"). A product of FP8 matrices wants both operands contiguous in the summed
dimension, so a matrix that takes part in two products is written in both orders while it is read once.

Shape letters: N rows, F features, Q = N rounded up to a multiple of 16, which FP8 products demand.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.kernels.choice import Kernels

FORWARD_DTYPE = torch.float8_e4m3fn
GRADIENT_DTYPE = torch.float8_e5m2
MULTIPLE = 16
# A tensor of zeros has a scale too; nothing that training meets is as small.
SMALLEST = 2.0**-100


class Fp8(NamedTuple):
    """A matrix in FP8; the rounded value of an element is its entry times `scale`."""

    rows_NF: Tensor | None
    columns_FQ: Tensor | None
    """Its transpose, with zeros behind the last row."""
    scale: Tensor
    """fp32 scalar."""


def cast_to_fp8(
    value_NF: Tensor, dtype: torch.dtype, *, rows: bool = True, columns: bool = False, kernels: Kernels = "torch"
) -> Fp8:
    """`value_NF` in an FP8 `dtype`, in the orders that are asked for; what is not finite stays so."""
    if kernels == "triton":
        from pretrain.kernels.fp8_cast_triton import cast_to_fp8 as cast_with_triton

        num_columns = padded(len(value_NF)) if columns else None
        return Fp8(*cast_with_triton(value_NF, dtype, rows=rows, num_columns=num_columns, smallest=SMALLEST))
    limit = torch.finfo(dtype).max
    scale = value_NF.abs().amax().float().clamp(min=SMALLEST) / limit
    rounded_NF = (value_NF.float() / scale).clamp(-limit, limit).to(dtype)
    columns_FQ = None
    if columns:
        columns_FQ = rounded_NF.new_zeros(value_NF.shape[1], padded(len(value_NF)))
        columns_FQ[:, : len(value_NF)] = rounded_NF.t()
    return Fp8(rounded_NF if rows else None, columns_FQ, scale)


def padded(num_rows: int) -> int:
    """The smallest multiple of 16 that is not below."""
    return -(-num_rows // MULTIPLE) * MULTIPLE
