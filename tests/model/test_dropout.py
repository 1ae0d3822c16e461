"""Dropout as a function of a key: rate, mean, independence, equality with the definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pretrain.kernels.dropout import dropout
from pretrain.kernels.dropout_mask import HiddenDropout, draw_levels, drop_threshold, keep_scale
from pretrain.model.dropout import AFTER_ATTENTION, AFTER_FFN, DropoutKey, keep_mask

CPU = torch.device("cpu")
LARGE = 2**40 + 5  # block numbers beyond 32 bits


def _words(seed: int = 1, micro_batch_index: int = 7, index: int = 2, place: int = AFTER_ATTENTION) -> Tensor:
    return DropoutKey.of(seed, micro_batch_index, 4, CPU).at(index)[place]


def _plain_levels(words: Tensor, line: int, width: int) -> list[int]:
    """The definition again, in Python's integers."""
    key_low, key_high, place, low, high = words[:5].tolist()
    levels: list[int] = []
    for number in range(-(-width // 8)):
        block = line * -(-width // 8) + number
        c, k = [block & 0xFFFFFFFF, (block >> 32) | place, low, high], [key_low, key_high]
        for _ in range(7):
            left, right = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(right >> 32) ^ c[1] ^ k[0], right & 0xFFFFFFFF, (left >> 32) ^ c[3] ^ k[1], left & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        levels += [half for word in c for half in (word & 0xFFFF, word >> 16)]
    return levels[:width]


def test_torch_and_cpp_draw_what_is_defined() -> None:
    words = _words(seed=2**64 - 3, micro_batch_index=2**40 + 9, index=5, place=AFTER_FFN)
    lines, width = torch.tensor([[0, 1, 5], [LARGE, 17, 2**31]]), 21
    expected = torch.tensor([[_plain_levels(words, int(line), width) for line in row] for row in lines])
    assert torch.equal(draw_levels(words, lines, width), expected)
    for probability in (0.0, 0.1, 0.5, 1.0):
        assert torch.equal(keep_mask(words, lines, width, probability), expected >= drop_threshold(probability))


@pytest.mark.parametrize("width", [1, 8, 12, 300])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_dropped_line_does_not_depend_on_its_neighbours(width: int, threads: int) -> None:
    hidden = torch.rand(700, width) + 1
    words = _words()
    torch.set_num_threads(threads)
    try:
        whole = dropout(hidden, HiddenDropout(0.3, words))
        keep = keep_mask(words, torch.arange(700), width, 0.3)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(whole, hidden * keep * keep_scale(drop_threshold(0.3)))
    assert torch.equal(whole[500:], dropout(hidden[500:], HiddenDropout(0.3, words, 500)))
    line_N = torch.randperm(700)[:30]
    assert torch.equal(whole[line_N], dropout(hidden[line_N], HiddenDropout(0.3, words, line_N=line_N)))


def test_seeds_micro_batches_layers_and_places_drop_independently() -> None:
    lines = torch.arange(2000)
    drawn = {
        (seed, number, index, place): keep_mask(_words(seed, number, index, place), lines, 64, 0.5)
        for seed in (1, 2**33 + 1)
        for number in (7, 8, 2**33 + 7)
        for index in (1, 2)
        for place in (AFTER_ATTENTION, AFTER_FFN)
    }
    for one, other in itertools.combinations(drawn.values(), 2):
        assert abs(float((one == other).double().mean()) - 0.5) < 0.008  # 5.7 standard deviations
    again = keep_mask(_words(1, 7, 2, AFTER_FFN), lines, 64, 0.5)
    assert torch.equal(again, drawn[1, 7, 2, AFTER_FFN])


@pytest.mark.parametrize("probability", [0.001, 0.1, 0.5, 0.9])
def test_rate_and_mean(probability: float) -> None:
    keep = keep_mask(_words(), torch.arange(1000), 1001, probability)
    deviation = (probability * (1 - probability) / keep.numel()) ** 0.5
    assert abs(float((~keep).double().mean()) - probability) < 5 * deviation + 2**-17
    assert keep_scale(drop_threshold(probability)) == pytest.approx(1 / (1 - probability), rel=2e-4)


def test_neighbours_are_independent() -> None:
    keep = keep_mask(_words(), torch.arange(4000), 128, 0.5).flatten()
    for distance in (1, 2, 3, 4, 7, 8, 9, 16, 127, 128, 129, 1024):
        assert abs(float((keep[distance:] == keep[:-distance]).double().mean()) - 0.5) < 0.004
    counts = np.bincount(draw_levels(_words(), torch.arange(4000), 128).flatten().numpy() >> 8, minlength=256)
    assert ((counts - 2000) ** 2 / 2000).sum() < 370  # chi square of 255 degrees of freedom: 5 standard deviations


def test_dropout_zeroes_scales_and_passes_the_gradient_of_what_stays() -> None:
    for dtype in (torch.float32, torch.float64):
        hidden = (torch.rand(50, 7, dtype=dtype) + 1).requires_grad_()
        dropped = dropout(hidden, HiddenDropout(0.25, _words()))
        dropped.sum().backward()
        is_kept = dropped != 0
        assert 0 < int(is_kept.sum()) < is_kept.numel()
        assert_close(dropped[is_kept], hidden[is_kept] / 0.75)
        assert hidden.grad is not None
        assert_close(hidden.grad, is_kept / torch.tensor(0.75, dtype=dtype))
        assert torch.equal(is_kept, keep_mask(_words(), torch.arange(50), 7, 0.25))


def test_it_keeps_the_type_and_takes_other_layouts() -> None:
    assert dropout(torch.rand(5, 7).bfloat16(), HiddenDropout(0.25, _words())).dtype == torch.bfloat16
    hidden = torch.rand(7, 5).t()
    drop = HiddenDropout(0.25, _words())
    assert torch.equal(dropout(hidden, drop), dropout(hidden.contiguous(), drop))
    assert dropout(torch.rand(0, 7), drop).shape == (0, 7)
