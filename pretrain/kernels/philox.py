"""The random half-words of a line in Triton, the same as `dropout_mask.draw_levels`, for kernels that drop units."""

# ruff: noqa: N803  # constants of a kernel have capitals

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def draw_blocks(words, block):
    """Four random words of every block; `block` is int64, `words` points to the words of a place."""
    key_low = tl.load(words).to(tl.uint32)
    key_high = tl.load(words + 1).to(tl.uint32)
    place = tl.load(words + 2).to(tl.uint32)
    batch_low = tl.load(words + 3).to(tl.uint32)
    batch_high = tl.load(words + 4).to(tl.uint32)
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32) | place
    zero = low & 0
    return tl.philox_impl(low, high, zero | batch_low, zero | batch_high, key_low, key_high, 7)


@triton.jit
def keep_lines(words, line_R, threshold, NUM_BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Which of the 8 elements of the first BLOCK blocks of some lines are kept, bool [R, BLOCK, 8].

    NUM_BLOCKS is how many blocks a line has; `line_R` is int64.
    """
    word_0, word_1, word_2, word_3 = draw_blocks(words, line_R[:, None] * NUM_BLOCKS + tl.arange(0, BLOCK)[None, :])
    lane = tl.arange(0, 8)[None, None, :]
    word = tl.where(
        lane < 4,
        tl.where(lane < 2, word_0[:, :, None], word_1[:, :, None]),
        tl.where(lane < 6, word_2[:, :, None], word_3[:, :, None]),
    )
    level = tl.where(lane % 2 == 0, word & 0xFFFF, word >> 16)
    return level.to(tl.int32) >= threshold


def rows_per_program(device: torch.device, num_lines: int) -> int:
    """Lines that a program takes at once: one on a GPU; many in the interpreter, which is slow per program."""
    return 1 if device.type == "cuda" else min(64, triton.next_power_of_2(max(num_lines, 1)))
