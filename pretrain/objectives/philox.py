"""Philox 4x32-10: random words as a pure function of a counter and a key, the same on CPU and GPU.

The objective draws its pairs from it, so no generator state has to be saved, shared or restored. Algorithm: Salmon et
al. 2011, "Parallel random numbers: as easy as 1, 2, 3". Words are int64 tensors that hold 0 .. 2^32 - 1.
"""

from __future__ import annotations

from torch import Tensor

MASK_32 = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox_4x32(counter: Words, key: tuple[int, int] | tuple[Tensor, Tensor], num_rounds: int = _ROUNDS) -> Words:
    """Four random words for every counter; the counter's four int64 tensors broadcast against each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(num_rounds):
        # A product of two words may exceed 2^63 and wrap to a negative int64; its bits are still right, and the mask
        # after the arithmetic shift removes the copies of the sign.
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0 = (product_1 >> 32).bitwise_and_(MASK_32) ^ c1 ^ k0
        c2 = (product_0 >> 32).bitwise_and_(MASK_32) ^ c3 ^ k1
        c1, c3 = product_1 & MASK_32, product_0 & MASK_32
        k0, k1 = (k0 + _WEYL_0) & MASK_32, (k1 + _WEYL_1) & MASK_32
    return c0, c1, c2, c3


def split_words(number: int) -> tuple[int, int]:
    """Low and high word of a number in 0 .. 2^64 - 1."""
    return number & MASK_32, (number >> 32) & MASK_32


def uniform_below(word: Tensor, bound: Tensor | int) -> Tensor:
    """Integers in 0 .. bound - 1 (0 where bound is 0), bound < 2^31; no value is favoured by more than bound / 2^32."""
    return (word * bound) >> 32
