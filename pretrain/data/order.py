"""The order of samples as a function of (seed, epoch, position): nothing is shuffled, nothing is stored.

The position in the data is therefore one number, the samples consumed so far, and any number of ranks reads the same
stream. The permutation itself is in csrc/include/taco/permutation.hpp.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pretrain.data.native import native


def permute(seed: int, epoch: int, positions: np.ndarray, num_samples: int) -> np.ndarray:
    """Samples at `positions` (int64 [n], each below `num_samples`) of one epoch, int64 [n]; a bijection per epoch.

    Raises:
        IndexError: a position is outside 0 .. num_samples - 1.
        ValueError: `num_samples` is outside 1 .. 2^62 or the epoch outside 0 .. 2^32 - 1.
    """
    return native().permute(seed, epoch, positions, num_samples)


def sample_at(seed: int, epoch: int, position: int, num_samples: int) -> int:
    """Like `permute`, for one position."""
    return int(permute(seed, epoch, np.array([position], np.int64), num_samples)[0])


def walk(seed: int, positions: np.ndarray, num_samples: int, *, shuffle: bool) -> tuple[np.ndarray, np.ndarray]:
    """Epoch and sample at positions of the endless stream (int64 [n], 0 or more), int64 [n] each.

    Epoch e covers positions e * num_samples .. (e + 1) * num_samples - 1; without shuffling, samples come in storage
    order.
    """
    epochs, samples = np.divmod(positions, num_samples)
    if not shuffle or not epochs.size:
        return epochs, samples
    if epochs.min() == epochs.max():  # nearly every micro-batch
        return epochs, permute(seed, int(epochs[0]), samples, num_samples)
    for epoch in np.unique(epochs):
        is_inside = epochs == epoch
        samples[is_inside] = permute(seed, int(epoch), samples[is_inside], num_samples)
    return epochs, samples


class Blend:
    """Several datasets in fixed proportions, by csrc/include/taco/blend.hpp; a function of (seed, position)."""

    PERIOD = 2**20  # positions; the proportions are exact in every period

    def __init__(self, seed: int, weights: Sequence[float], num_rows: Sequence[int], *, shuffle: bool) -> None:
        """Blends datasets of `num_rows` rows each by positive `weights` with any sum.

        Raises:
            ValueError: a weight is not positive or below 2^-20 of the sum, the numbers of weights and datasets differ,
                or there is no row.
        """
        self.weights = native().whole_weights(np.array(weights, np.float64))
        self._native = native().Blend(seed, self.weights, np.array(num_rows, np.int64), shuffle)

    def look_up(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Dataset, its epoch and its row at positions of the endless stream; int64 [n] each.

        Raises:
            IndexError: a position is below 0 or beyond 2^52.
        """
        return self._native.look_up(positions)
