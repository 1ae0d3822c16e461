"""The sum of the squares of a flat buffer that no finite element can make infinite.

The definition is `squared_norm` in `pretrain/optim/norms.py`. fp32 holds the square of no number above 1e19, so large
elements are added up apart, scaled down (Blue 1978, "A Portable Fortran Program to Find the Euclidean Norm").

Shape letters: N elements of the buffer, G blocks of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
_LARGE = 2.0**60
_DOWN = 2.0**-80


@triton.jit
def _add_squares(buffer, sums, num_elements, LARGE: tl.constexpr, DOWN: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    block = tl.program_id(0)
    place = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(buffer + place, mask=place < num_elements, other=0.0).to(tl.float32)
    is_large = tl.abs(x) > LARGE  # false for NaN, which stays with the ordinary elements
    ordinary, large = tl.where(is_large, 0.0, x), tl.where(is_large, x * DOWN, 0.0)
    tl.store(sums + 2 * block, tl.sum(ordinary * ordinary, axis=0))
    tl.store(sums + 2 * block + 1, tl.sum(large * large, axis=0))


def block_sums(buffer_N: Tensor) -> Tensor:
    """[G, 2] fp32 of a contiguous buffer: squares of ordinary elements, and of large ones times 2 ** -160."""
    num_blocks = triton.cdiv(buffer_N.numel(), _BLOCK)
    sums_G2 = torch.empty(num_blocks, 2, device=buffer_N.device)
    _add_squares[(num_blocks,)](
        buffer_N, sums_G2, buffer_N.numel(), LARGE=_LARGE, DOWN=_DOWN, BLOCK=_BLOCK, num_warps=8
    )
    return sums_G2


def fused_squared_norm(tensors: list[Tensor]) -> Tensor:
    """`squared_norm`: one kernel per tensor, and one fp64 sum over the blocks of all."""
    sums_2 = torch.cat([block_sums(tensor) for tensor in tensors]).sum(0, dtype=torch.float64)
    return sums_2[0] + sums_2[1] * 2.0**160
