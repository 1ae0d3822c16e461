"""The order of samples: equal to the plain version, a bijection, even over seeds, without end."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_versions import Permutation, philox4x32

from pretrain.data.native import native
from pretrain.data.order import permute, sample_at, walk

KNOWN_ANSWERS = [  # of the Random123 distribution
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
seeds = st.integers(0, 2**63 - 1)
epochs = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter: tuple, key: tuple, answer: tuple) -> None:
    assert philox4x32(counter, key) == answer
    assert tuple(native().philox4x32(np.array(counter, np.uint32), np.array(key, np.uint32))) == answer


@settings(deadline=None, derandomize=True)
@given(seed=seeds, epoch=epochs, size=st.one_of(st.integers(1, 2500), st.integers(1, 2**62)), data=st.data())
def test_it_equals_the_plain_version_and_has_an_inverse(seed: int, epoch: int, size: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20))
    plain = Permutation(seed, epoch, size)
    samples = permute(seed, epoch, np.array(positions), size).tolist()
    assert samples == [plain(position) for position in positions]
    assert [plain.inverse(sample) for sample in samples] == positions
    assert sample_at(seed, epoch, positions[0], size) == samples[0]


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_it_is_a_bijection_for_every_small_size(seed: int) -> None:
    for size in [*range(1, 300), *range(1000, 1100), 2047, 2048, 2049, 4097, 65_536, 65_537, 100_003]:
        for epoch in (0, 1):
            samples = permute(seed, epoch, np.arange(size), size)
            assert np.array_equal(np.sort(samples), np.arange(size)), (seed, epoch, size)


@pytest.mark.parametrize("size", [2**31 - 1, 2**31 + 1, 2**32 + 1, 10**12, 2**61 + 1, 2**62])
def test_large_sizes_give_distinct_samples_in_range(size: int) -> None:
    positions = np.concatenate([np.arange(20_000), np.arange(size - 20_000, size)])
    samples = permute(3, 0, positions, size)
    assert len(np.unique(samples)) == len(positions)
    assert samples.min() >= 0
    assert samples.max() < size
    assert abs(samples.mean() / size - 0.5) < 0.01  # standard deviation 0.0015


def chi_square(counts: np.ndarray) -> float:
    """(statistic - degrees of freedom) / its standard deviation; below 4 for even counts, nearly always."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_orders_of_a_tiny_set_are_equally_likely(size: int) -> None:
    orders = [tuple(permute(seed, 0, np.arange(size), size)) for seed in range(12_000)]
    counts = np.unique(np.array(orders), axis=0, return_counts=True)[1]
    assert counts.size == [1, 1, 2, 6, 24, 120][size]
    assert chi_square(counts) < 4


@pytest.mark.parametrize("size", [7, 100, 1000, 1024, 1025, 1300, 2048, 5000])
def test_every_place_and_neighbourhood_is_equally_likely(size: int) -> None:
    """Over seeds: the place of two fixed positions, and of neighbours relative to one another, in 6 x 6 cells."""
    pairs = np.array([permute(seed, 0, np.array([0, 1, size // 2]), size) for seed in range(20_000)])
    ranks = np.arange(size) * 6 // size
    weights = np.bincount(ranks) / size  # cells differ in size where 6 does not divide it
    for other in (1, 2):
        counts = np.zeros((6, 6))
        np.add.at(counts, (ranks[pairs[:, 0]], ranks[pairs[:, other]]), 1)
        expected = 20_000 * np.outer(weights, weights) * size
        expected[np.diag_indices(6)] -= 20_000 * weights
        expected /= size - 1  # two positions never meet in one sample
        inside = expected > 0
        statistic = ((counts - expected)[inside] ** 2 / expected[inside]).sum()
        assert statistic < 35 + 4 * np.sqrt(70), (size, other)
        assert counts[~inside].sum() == 0


@pytest.mark.parametrize("size", [1000, 1025, 2000, 70_000])
def test_neighbours_are_scattered_within_one_order(size: int) -> None:
    """Steps from one sample to the next are spread evenly round the circle."""
    for seed in range(5):
        samples = permute(seed, 0, np.arange(size), size)
        steps = (np.diff(samples) % size) * 20 // size
        assert chi_square(np.bincount(steps, minlength=20)) < 5
        assert abs(np.corrcoef(samples, np.arange(size))[0, 1]) < 4.5 / np.sqrt(size)


def test_epochs_and_seeds_give_other_orders() -> None:
    first = permute(1, 0, np.arange(1000), 1000)
    for seed, epoch in ((1, 1), (2, 0), (1 + 2**32, 0)):
        assert (permute(seed, epoch, np.arange(1000), 1000) == first).mean() < 0.02


@pytest.mark.parametrize(
    ("epoch", "position", "size", "error", "named"),
    [
        (0, 5, 5, IndexError, "position 5 of 5"),
        (0, -1, 5, IndexError, "position -1 of 5"),
        (0, 0, 0, ValueError, "size must be 1 to 2.62"),
        (0, 0, 2**62 + 1, ValueError, "size must be 1 to 2.62"),
        (-1, 0, 5, ValueError, "epoch must be 0"),
        (2**32, 0, 5, ValueError, "epoch must be 0"),
    ],
)
def test_what_is_out_of_range_is_refused(epoch: int, position: int, size: int, error: type, named: str) -> None:
    with pytest.raises(error, match=named):
        permute(0, epoch, np.array([position]), size)


def test_another_dtype_is_not_cast() -> None:
    with pytest.raises(TypeError):
        permute(0, 0, np.arange(5, dtype=np.int32), 5)
    with pytest.raises(TypeError):
        permute(0, 0, np.arange(10)[::2], 10)


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_stream_takes_every_sample_once_per_epoch(shuffle: bool) -> None:
    walked_epochs, samples = walk(9, np.arange(35), 7, shuffle=shuffle)
    assert walked_epochs.tolist() == [i // 7 for i in range(35)]
    for epoch in range(5):
        assert sorted(samples[7 * epoch : 7 * epoch + 7]) == list(range(7))
    is_in_order = samples.tolist() == [i % 7 for i in range(35)]
    assert is_in_order is not shuffle
    assert (len({tuple(samples[7 * epoch : 7 * epoch + 7]) for epoch in range(5)}) > 1) is shuffle  # orders differ
    some = np.array([20, 3, 30, 3])
    assert walk(9, some, 7, shuffle=shuffle)[1].tolist() == samples[some].tolist()
