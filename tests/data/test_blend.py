"""Weighted blends against a plain version: exact proportions in every period, every row once in every epoch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_versions import blended

from pretrain.data.native import native

PERIOD = 2**20


def blend(seed: int, weights: list[int], num_rows: list[int], shuffle: bool = True):
    return native().Blend(seed, np.array(weights, np.int64), np.array(num_rows, np.int64), shuffle)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    seed=st.integers(0, 2**64 - 1),
    shares=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5),
    sizes=st.lists(st.one_of(st.integers(1, 40), st.integers(1000, 10**9)), min_size=5, max_size=5),
    positions=st.lists(st.integers(0, 2**26), min_size=1, max_size=8),
)
def test_samples_equal_the_plain_version(seed: int, shares: list, sizes: list, positions: list) -> None:
    weights = native().whole_weights(np.array(shares)).tolist()
    sizes = sizes[: len(weights)]
    found = blend(seed, weights, sizes).look_up(np.array(positions))
    assert list(zip(*(part.tolist() for part in found), strict=True)) == [
        blended(seed, weights, sizes, position) for position in positions
    ]


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    seed=st.integers(0, 2**64 - 1),
    sizes=st.lists(st.one_of(st.integers(2**20, 2**21), st.integers(2**20, 2**61)), min_size=3, max_size=3),
    positions=st.lists(st.integers(0, 2**52 - 1), min_size=1, max_size=8),
)
def test_the_farthest_positions_equal_the_plain_version(seed: int, sizes: list, positions: list) -> None:
    weights = [2, 5, PERIOD - 7]
    found = blend(seed, weights, sizes).look_up(np.array(positions))
    assert list(zip(*(part.tolist() for part in found), strict=True)) == [
        blended(seed, weights, sizes, position) for position in positions
    ]


@pytest.mark.parametrize("shuffle", [True, False])
def test_it_does_not_matter_how_positions_are_divided_into_calls(shuffle: bool) -> None:
    generator = np.random.default_rng(3)
    weights = native().whole_weights(generator.random(300) + 0.001)
    found = native().Blend(5, weights, generator.integers(1, 5000, 300), shuffle)
    positions = np.concatenate((np.arange(PERIOD - 3000, PERIOD + 3000), generator.integers(0, 2**30, 3000)))
    together = np.array(found.look_up(positions))
    for size in (1, 100, 2048, 5001):
        parts = [found.look_up(positions[first : first + size]) for first in range(0, len(positions), size)]
        assert np.array_equal(np.concatenate(parts, axis=1), together)
    assert np.array_equal(found.look_up(positions[:0]), np.empty((3, 0)))


def test_a_period_holds_exact_proportions_and_an_epoch_every_row_once() -> None:
    weights, num_rows = [1, 1000, PERIOD - 1001], [3, 999, 300_000]
    datasets, epochs, rows = blend(7, weights, num_rows).look_up(np.arange(3 * PERIOD))
    for period in range(3):
        counts = np.bincount(datasets[period * PERIOD : (period + 1) * PERIOD], minlength=3)
        assert counts.tolist() == weights
    for dataset, size in enumerate(num_rows):
        is_own = datasets == dataset
        for epoch in range(int(epochs[is_own].max()) + 1):
            found = np.sort(rows[is_own & (epochs == epoch)])
            is_complete = (epoch + 1) * size <= 3 * weights[dataset]
            assert np.array_equal(found, np.arange(size)) if is_complete else len(np.unique(found)) == len(found)
    assert not np.array_equal(rows[datasets == 2][:1000], np.arange(1000))


def test_unshuffled_rows_come_in_their_own_order() -> None:
    datasets, epochs, rows = blend(7, [PERIOD // 2] * 2, [10, 10**6], shuffle=False).look_up(np.arange(PERIOD))
    own = epochs[datasets == 0] * 10 + rows[datasets == 0]
    assert np.array_equal(np.sort(own), np.arange(PERIOD // 2))


@pytest.mark.parametrize(
    ("weights", "num_rows", "named"),
    [
        ([PERIOD], [5, 5], "1 weights for 2 datasets"),
        ([PERIOD, 0], [5, 5], "weight 0 is not in"),
        ([PERIOD - 1], [5], "add up to 1048575"),
        ([PERIOD], [0], "dataset 0 has no row"),
        ([], [], "add up to 0"),
    ],
)
def test_bad_blends_are_refused(weights: list, num_rows: list, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        blend(1, weights, num_rows)


def test_positions_outside_are_refused() -> None:
    small = blend(1, [PERIOD], [1])
    for position in (-1, 2**52, 2**40):
        with pytest.raises(IndexError, match="blend: "):
            small.look_up(np.array([position]))


@pytest.mark.parametrize(
    ("shares", "expected"),
    [([3.0], [PERIOD]), ([1, 1, 1], [349526, 349525, 349525]), ([0.5, 0.25, 0.25], [2**19, 2**18, 2**18])],
)
def test_shares_become_whole_weights(shares: list, expected: list) -> None:
    assert native().whole_weights(np.array(shares, np.float64)).tolist() == expected


@pytest.mark.parametrize("shares", [[], [0.0, 1.0], [-1.0], [float("nan")], [float("inf")], [1e-9, 1.0]])
def test_bad_shares_are_refused(shares: list) -> None:
    with pytest.raises(ValueError, match="blend: "):
        native().whole_weights(np.array(shares, np.float64))


@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=80))
def test_whole_weights_add_up_and_are_near(shares: list) -> None:
    weights = native().whole_weights(np.array(shares))
    assert weights.sum() == PERIOD
    assert np.abs(weights - np.array(shares) / sum(shares) * PERIOD).max() < 1.001
