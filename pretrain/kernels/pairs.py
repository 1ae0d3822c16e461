"""The pairs of the contrastive loss in Triton: the integers of `objectives.taco.sample_pairs`, which defines them.

Positives and a list of the valid tokens are one integer per token (`PairTable`). Negatives, K integers per token, are
drawn by the kernel that needs them, with `draw_negatives`, and never lie in memory; `draw_pairs` writes all of them out
for whoever wants to look at them. The key lies on the device, so a captured CUDA graph can take another micro-batch at
each replay, and nothing here waits for the GPU.

Another source of candidates (other rows' tokens at the anchor's own column, its own document outside the window, other
ranks' tokens) is one more function beside `draw_negatives`, with blocks of the counter of its own.

A micro-batch is a grid of rows, and its places row * L + column key what is drawn. The hidden states may be those of
some of the places only, in an order of their own (`model.token_rows`): then tokens have other numbers than places.

Shape letters: B rows, L places per row, G = B * L places of the grid, K negatives, N places of a program.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pretrain.objectives.taco import NO_TOKEN, PAIR_DOMAIN, check_sampling

_DOMAIN = tl.constexpr(PAIR_DOMAIN)
_NO_TOKEN = tl.constexpr(NO_TOKEN)
_MOST_TOKENS = 64  # of a program that compares tokens with each other


class PairTable(NamedTuple):
    """What the pairs of a micro-batch are drawn from; contiguous tensors on one device."""

    positive_G: Tensor
    """int32, the number of the positive of the token at each place, or -1 as in `sample_pairs`."""
    listed_G: Tensor
    """int32, the numbers of the valid tokens by their places; what is behind the last of them means nothing."""
    before_R: Tensor
    """int32 [B + 1], how many valid tokens stand before each row; the last entry counts all of them."""
    key_2: Tensor
    """int64, see `pair_key`."""


def pair_key(seed: int, micro_batch_index: int, device: torch.device) -> Tensor:
    """The bits of both numbers (0 .. 2^64 - 1) as int64 [2], filled in by the device: a copy would wait for it.

    A CUDA graph that was captured over it draws the pairs of another micro-batch after `key_2[1].fill_(number)`.
    """
    key_2 = torch.full((2,), _as_signed(seed), dtype=torch.int64, device=device)
    key_2[1].fill_(_as_signed(micro_batch_index))
    return key_2


def tabulate_pairs(
    valid_BL: Tensor, segment_BL: Tensor, key_2: Tensor, *, window: int, token_G: Tensor | None = None
) -> PairTable:
    """Draw the positives of a micro-batch and list its valid tokens, in one launch.

    `token_G` has the numbers of the valid tokens at their places; without it the places are the numbers.
    """
    num_rows, length = valid_BL.shape
    positive_G, listed_G = valid_BL.new_empty(2, num_rows * length, dtype=torch.int32)
    before_R = positive_G.new_empty(num_rows + 1)
    block = min(_MOST_TOKENS, triton.next_power_of_2(length))
    _tabulate_kernel[(num_rows, triton.cdiv(length, block))](
        valid_BL.contiguous().view(torch.uint8),
        segment_BL.contiguous(),
        token_G,
        key_2,
        positive_G,
        listed_G,
        before_R,
        num_rows,
        LENGTH=length,
        WINDOW=window,
        BLOCK=block,
    )
    return PairTable(positive_G, listed_G, before_R, key_2)


def draw_pairs(
    valid_BL: Tensor,
    *,
    window: int,
    num_negatives: int,
    seed: int,
    micro_batch_index: int,
    segment_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`objectives.taco.sample_pairs` with the same arguments, answers and errors, by the functions of this module."""
    check_sampling(valid_BL, window, num_negatives, seed, micro_batch_index, segment_BL)
    segment_BL = torch.zeros_like(valid_BL, dtype=torch.uint8) if segment_BL is None else segment_BL
    table = tabulate_pairs(valid_BL, segment_BL, pair_key(seed, micro_batch_index, valid_BL.device), window=window)
    num_rows, length = valid_BL.shape
    negative_BLK = valid_BL.new_empty(num_rows, length, num_negatives, dtype=torch.int64)
    block = min(_MOST_TOKENS, triton.next_power_of_2(num_rows * length))
    _write_negatives_kernel[(triton.cdiv(num_rows * length, block),)](
        valid_BL.contiguous().view(torch.uint8),
        table.listed_G,
        table.before_R,
        table.key_2,
        negative_BLK,
        num_rows,
        LENGTH=length,
        NUM_NEGATIVES=num_negatives,
        BLOCK=block,
    )
    positive_BL = table.positive_G.view(num_rows, length).long()
    return torch.where(positive_BL < 0, NO_TOKEN, positive_BL % length), negative_BLK


def _as_signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


# -- device functions --------------------------------------------------------------------------------------------------


@triton.jit
def load_key(key):
    """The words of a `pair_key`: seed low, seed high with the domain of pairs, micro-batch low, micro-batch high."""
    seed, micro_batch = tl.load(key), tl.load(key + 1)
    seed_high = (seed >> 32).to(tl.uint32) ^ _DOMAIN
    return seed.to(tl.uint32), seed_high, micro_batch.to(tl.uint32), (micro_batch >> 32).to(tl.uint32)


@triton.jit
def load_others(before, row_N, num_rows):
    """Of each row: how many valid tokens stand before it, in it, and in all other rows."""
    num_before_N = tl.load(before + row_N)
    num_own_N = tl.load(before + row_N + 1) - num_before_N
    return num_before_N, num_own_N, tl.load(before + num_rows) - num_own_N


@triton.jit
def draw_negatives(key, listed, place_N, block, num_before_N, num_own_N, num_others_N, has_others_N):
    """Numbers of the negatives 4 * block .. 4 * block + 3 of the tokens at places, a vector for each of the four.

    `key` is what `load_key` gives, the rest what `load_others` gives. Where `has_others_N` is False nothing is read.
    """
    words = tl.philox_impl(
        place_N.to(tl.uint32),
        tl.full((), block + 1, tl.uint32),  # block 0 is the positive's
        key[2],
        key[3],
        key[0],
        key[1],
    )
    return (
        _pick(listed, words[0], num_before_N, num_own_N, num_others_N, has_others_N),
        _pick(listed, words[1], num_before_N, num_own_N, num_others_N, has_others_N),
        _pick(listed, words[2], num_before_N, num_own_N, num_others_N, has_others_N),
        _pick(listed, words[3], num_before_N, num_own_N, num_others_N, has_others_N),
    )


@triton.jit
def _pick(listed, word_N, num_before_N, num_own_N, num_others_N, has_others_N):
    place_N = tl.umulhi(word_N, num_others_N.to(tl.uint32)).to(tl.int32)
    place_N += tl.where(place_N >= num_before_N, num_own_N, 0)  # skips the token's own row
    return tl.load(listed + place_N, mask=has_others_N, other=0)


# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def _tabulate_kernel(
    valid,
    segment,
    numbers,
    key,
    positive,
    listed,
    before,
    num_rows,
    LENGTH: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some tokens of one row: their positives. The row's first program lists the row's valid tokens too."""
    row = tl.program_id(0)
    start = row * LENGTH
    if tl.program_id(1) == 0:
        _list_row(valid, numbers, listed, before, row, num_rows, LENGTH, BLOCK)
    valid += start
    segment += start
    column_N = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside_N = column_N < LENGTH
    is_valid_N = tl.load(valid + column_N, mask=is_inside_N, other=0) != 0
    document_N = tl.load(segment + column_N, mask=is_inside_N, other=0)
    seed_low, seed_high, micro_batch_low, micro_batch_high = load_key(key)
    offset_word_N, other_word_N, _, _ = tl.philox_impl(
        (start + column_N).to(tl.uint32),
        tl.full((), 0, tl.uint32),
        micro_batch_low,
        micro_batch_high,
        seed_low,
        seed_high,
    )
    offset_N = tl.umulhi(offset_word_N, tl.full((), 2 * WINDOW, tl.uint32)).to(tl.int32)
    near_N = column_N + offset_N - WINDOW + (offset_N >= WINDOW).to(tl.int32)
    fits_N = is_valid_N & (near_N >= 0) & (near_N < LENGTH)
    fits_N = fits_N & (tl.load(valid + near_N, mask=fits_N, other=0) != 0)
    fits_N = fits_N & (tl.load(segment + near_N, mask=fits_N, other=0) == document_N)
    answer_N = tl.where(fits_N, near_N, _NO_TOKEN)
    misses_N = is_valid_N & ~fits_N
    if tl.sum(misses_N.to(tl.int32), 0) > 0:
        other_N = _draw_other(valid, segment, column_N, document_N, other_word_N, LENGTH, BLOCK)
        answer_N = tl.where(misses_N, other_N, answer_N)
    answer_N = tl.where(answer_N >= 0, _number(numbers, start + answer_N, answer_N >= 0), _NO_TOKEN)
    tl.store(positive + start + column_N, answer_N, mask=is_inside_N)


@triton.jit
def _number(numbers, place_N, is_token_N):
    """The numbers of the tokens at some places."""
    token_N = place_N
    if numbers is not None:
        token_N = tl.load(numbers + place_N, mask=is_token_N, other=0).to(tl.int32)
    return token_N


@triton.jit
def _list_row(valid, numbers, listed, before, row, num_rows, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    """Counts the valid tokens before a row, and lists its own behind them."""
    start = row * LENGTH
    lane = tl.arange(0, 16 * BLOCK)
    count = tl.full((), 0, tl.int32)
    for first in range(0, start, 16 * BLOCK):
        is_valid = tl.load(valid + first + lane, mask=first + lane < start, other=0)
        count += tl.sum(is_valid.to(tl.int32), 0)
    tl.store(before + row, count)
    lane = tl.arange(0, BLOCK)
    for first in range(0, LENGTH, BLOCK):
        is_valid = tl.load(valid + start + first + lane, mask=first + lane < LENGTH, other=0).to(tl.int32)
        token = _number(numbers, start + first + lane, is_valid != 0)
        tl.store(listed + count + tl.cumsum(is_valid, 0) - 1, token, mask=is_valid != 0)
        count += tl.sum(is_valid, 0)
    tl.store(before + num_rows, count, mask=row == num_rows - 1)


@triton.jit
def _draw_other(valid, segment, column_N, document_N, word_N, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    """For valid tokens of one row the column of another one of the same document, or -1 where there is none."""
    num_mates_N = tl.zeros_like(column_N)
    num_before_N = tl.zeros_like(column_N)
    for first in range(0, LENGTH, BLOCK):
        place_M = first + tl.arange(0, BLOCK)
        is_mate_NM = _find_mates(valid, segment, place_M, document_N, LENGTH)
        num_mates_N += tl.sum(is_mate_NM, 1)
        num_before_N += tl.sum(tl.where(place_M[None, :] < column_N[:, None], is_mate_NM, 0), 1)
    wanted_N = tl.umulhi(word_N, tl.maximum(num_mates_N - 1, 0).to(tl.uint32)).to(tl.int32)
    wanted_N += (wanted_N >= num_before_N).to(tl.int32)  # skips the token itself
    num_seen_N = tl.zeros_like(column_N)
    found_N = tl.zeros_like(column_N)
    for first in range(0, LENGTH, BLOCK):
        place_M = first + tl.arange(0, BLOCK)
        is_mate_NM = _find_mates(valid, segment, place_M, document_N, LENGTH)
        rank_NM = num_seen_N[:, None] + tl.cumsum(is_mate_NM, 1) - 1
        is_found_NM = (is_mate_NM != 0) & (rank_NM == wanted_N[:, None])
        found_N += tl.sum(tl.where(is_found_NM, place_M[None, :], 0), 1)
        num_seen_N += tl.sum(is_mate_NM, 1)
    return tl.where(num_mates_N > 1, found_N, _NO_TOKEN)


@triton.jit
def _find_mates(valid, segment, place_M, document_N, LENGTH: tl.constexpr):
    """1 where place m of the row holds a valid token of the document of token n, else 0; int32 [N, M]."""
    is_inside_M = place_M < LENGTH
    is_valid_M = tl.load(valid + place_M, mask=is_inside_M, other=0) != 0
    document_M = tl.load(segment + place_M, mask=is_inside_M, other=0)
    return (is_valid_M[None, :] & (document_M[None, :] == document_N[:, None])).to(tl.int32)


@triton.jit
def _write_negatives_kernel(
    valid,
    listed,
    before,
    key,
    negative,
    num_rows,
    LENGTH: tl.constexpr,
    NUM_NEGATIVES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some tokens: their negatives."""
    place_N = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_inside_N = place_N < num_rows * LENGTH
    is_valid_N = tl.load(valid + place_N, mask=is_inside_N, other=0) != 0
    row_N = tl.where(is_inside_N, place_N // LENGTH, 0)
    num_before_N, num_own_N, num_others_N = load_others(before, row_N, num_rows)
    has_others_N = is_valid_N & (num_others_N > 0)
    words = load_key(key)
    own_N = negative + place_N.to(tl.int64) * NUM_NEGATIVES
    for block in range(0, (NUM_NEGATIVES + 3) // 4):
        drawn = draw_negatives(words, listed, place_N, block, num_before_N, num_own_N, num_others_N, has_others_N)
        for number in tl.static_range(4):
            answer_N = tl.where(has_others_N, drawn[number], _NO_TOKEN).to(tl.int64)
            tl.store(own_N + 4 * block + number, answer_N, mask=is_inside_N & (4 * block + number < NUM_NEGATIVES))
