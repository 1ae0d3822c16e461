"""Philox 4x32-10 against the published known answers and against Python's unbounded integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.objectives.philox import philox_4x32, split_words, uniform_below

# Random123's kat_vectors: counter, key, words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
WORD = st.integers(0, 2**32 - 1)


def _by_integers(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    (c0, c1, c2, c3), (k0, k1), mask = counter, key, 2**32 - 1
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & mask, (p0 >> 32) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def _by_tensors(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    words = philox_4x32(tuple(torch.tensor([word]) for word in counter), key)  # type: ignore[arg-type]
    return tuple(int(word) for word in words)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    assert _by_tensors(counter, key) == words
    assert _by_integers(counter, key) == words


@settings(max_examples=200, deadline=None)
@given(st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD))
def test_equals_unbounded_integers(counter: tuple[int, ...], key: tuple[int, int]) -> None:
    assert _by_tensors(counter, key) == _by_integers(counter, key)


def test_counters_broadcast_and_stay_untouched() -> None:
    rows, columns, zero = torch.arange(3)[:, None], torch.arange(5), torch.zeros(1, dtype=torch.int64)
    words = philox_4x32((rows, columns, zero, zero), (1, 2))
    assert [word.shape for word in words] == [torch.Size([3, 5])] * 4
    assert int(words[2][1, 4]) == _by_integers((1, 4, 0, 0), (1, 2))[2]
    assert rows.flatten().tolist() == [0, 1, 2]


def test_split_words() -> None:
    assert split_words(0x0123456789ABCDEF) == (0x89ABCDEF, 0x01234567)


def test_uniform_below_covers_its_range_and_nothing_else() -> None:
    words = torch.tensor([0, 1, 2**31, 2**32 - 1])
    assert uniform_below(words, 7).tolist() == [0, 0, 3, 6]
    assert uniform_below(words, 0).tolist() == [0, 0, 0, 0]
    assert uniform_below(words, 2**31 - 1).max() == 2**31 - 2
