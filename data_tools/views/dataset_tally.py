"""Counts over datasets, in one pass over the mapped files and in constant memory.

`LengthTally` counts documents (or sentences) by length, `TokenTally` the occurrences of each token id; both are exact,
so percentiles and shares are exact, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pretrain.data.dataset.indexed_dataset import IndexedDataset
from pretrain.errors import DataError

# Tokens, or lengths, processed at once.
_PIECE = 1 << 20
# Shorter lengths are counted in an array, the rare longer ones in a table.
_SHORT = 1 << 16
# Without a manifest there is no vocabulary size; an id above this is damage, not a token.
_LARGEST_VOCABULARY = 1 << 24
# Ranks between which a line is fitted to log frequency over log rank.
_ZIPF_RANKS = (10, 10_000)


@dataclass(frozen=True)
class Bin:
    """One bar of a histogram of lengths: lengths from `low` to `high`, their number and their sum."""

    low: int
    high: int
    number: int
    tokens: int


class LengthTally:
    """How often each length occurs."""

    def __init__(self) -> None:
        self._short = np.zeros(_SHORT, np.int64)
        self._long: Counter[int] = Counter()

    def add(self, lengths: np.ndarray) -> None:
        """Counts `lengths` (integers, 0 or more)."""
        is_short = lengths < _SHORT
        self._short += np.bincount(lengths[is_short], minlength=_SHORT)
        self._long.update(lengths[~is_short].tolist())

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """Every length that occurs, ascending, and how often; int64 [n] each."""
        short = np.flatnonzero(self._short)
        long = np.array(sorted(self._long), np.int64)
        counts = [self._short[short], np.array([self._long[length] for length in long.tolist()], np.int64)]
        return np.concatenate((short, long)), np.concatenate(counts)

    def percentile(self, share: float) -> int:
        """The smallest length that at least `share` percent do not exceed; 0 if nothing was counted."""
        lengths, counts = self.table()
        if not counts.size:
            return 0
        ends = np.cumsum(counts)
        return int(lengths[np.searchsorted(ends, share / 100 * ends[-1])])

    def histogram(self, bins_per_doubling: int = 1) -> list[Bin]:
        """Bars that begin at 0, 1, 2, 4, 8, ... (or with several bins per doubling), from the shortest length on."""
        lengths, counts = self.table()
        if not lengths.size:
            return []
        steps = np.arange(bins_per_doubling * (int(lengths[-1]).bit_length() + 1) + 1)
        lows = np.unique(np.concatenate(([0], np.ceil(2.0 ** (steps / bins_per_doubling)).astype(np.int64))))
        bin_of = np.searchsorted(lows, lengths, side="right") - 1
        bars = []
        for bar in range(int(bin_of[0]), int(bin_of[-1]) + 1):
            inside = bin_of == bar
            number, tokens = int(counts[inside].sum()), int((lengths[inside] * counts[inside]).sum())
            bars.append(Bin(int(lows[bar]), int(lows[bar + 1]) - 1, number, tokens))
        return bars


class TokenTally:
    """How often each id occurs; `counts` is int64 [vocabulary size, or largest id + 1 if that is unknown]."""

    def __init__(self, vocab_size: int | None) -> None:
        self._vocab_size = vocab_size
        self.counts = np.zeros(vocab_size or 0, np.int64)

    def add(self, dataset: IndexedDataset, on_progress: Callable[[int], None] = lambda num_bytes: None) -> None:
        """Counts all tokens of `dataset`; `on_progress` is called with the number of bytes counted.

        Raises:
            DataError: an id is not in the vocabulary.
        """
        limit = self._vocab_size or _LARGEST_VOCABULARY
        for first in range(0, dataset.num_tokens, _PIECE):
            # Read from the file instead of the mapping, whose touched pages would count as this process's memory.
            piece = _read_tokens(dataset, first)
            smallest, largest = int(piece.min()), int(piece.max())
            if smallest < 0 or largest >= limit:
                wrong = smallest if smallest < 0 else largest
                raise DataError(
                    f"{dataset.bin_path}: token id {wrong} between tokens {first} and {first + len(piece)} is not in a "
                    f"vocabulary of {limit}; `taco data verify --deep {dataset.prefix}` says where"
                )
            counts = np.bincount(piece, minlength=len(self.counts))
            counts[: len(self.counts)] += self.counts
            self.counts = counts
            on_progress(piece.nbytes)

    def frequencies(self) -> np.ndarray:
        """Counts of the ids that occur, most frequent first; int64 [n]."""
        return np.sort(self.counts[self.counts > 0])[::-1]

    def top_share(self, num_ids: int) -> float:
        """Share of all tokens that the `num_ids` most frequent ids make up."""
        frequencies = self.frequencies()
        return float(frequencies[:num_ids].sum() / max(int(frequencies.sum()), 1))

    def ids_for_share(self, share: float) -> int:
        """How many of the most frequent ids make up at least `share` of all tokens."""
        frequencies = self.frequencies()
        if not frequencies.size:
            return 0
        return int(np.searchsorted(np.cumsum(frequencies), share * frequencies.sum())) + 1

    def entropy(self) -> float:
        """Bits per token of the distribution of ids."""
        shares = self.frequencies() / max(int(self.counts.sum()), 1)
        return float(-(shares * np.log2(shares)).sum()) + 0.0

    def zipf_exponent(self) -> float | None:
        """s of frequency ~ rank^-s, fitted by least squares to logarithms at evenly spaced ranks; None if too few.

        Ranks 10 to 10,000: the most frequent and the rare words do not follow Zipf's law.
        """
        frequencies = self.frequencies()
        low, high = _ZIPF_RANKS[0], min(_ZIPF_RANKS[1], len(frequencies))
        ranks = np.unique(np.geomspace(low, max(high, low), 200).round().astype(np.int64))
        if len(ranks) < 10:
            return None
        slope, _ = np.polyfit(np.log(ranks), np.log(frequencies[ranks - 1]), 1)
        return float(-slope)


def _read_tokens(dataset: IndexedDataset, first: int) -> np.ndarray:
    count = min(_PIECE, dataset.num_tokens - first)
    piece = np.fromfile(dataset.bin_path, dataset.dtype, count, offset=first * dataset.dtype.itemsize)
    if len(piece) < count:
        raise DataError(f"{dataset.bin_path}: ends before token {first + count}; it was changed while it was read")
    return piece


def counts_of_files(dataset: IndexedDataset) -> dict[str, Any]:
    """The first fields of every report on a dataset."""
    return {
        "prefix": dataset.prefix,
        "documents": dataset.num_documents,
        "sequences": dataset.num_sequences,
        "tokens": dataset.num_tokens,
        "dtype": dataset.dtype.name,
        "bin_bytes": dataset.tokens.nbytes,
    }


def tally_documents(dataset: IndexedDataset) -> LengthTally:
    """Tokens per document."""
    tally = LengthTally()
    for first in range(0, dataset.num_documents, _PIECE):
        tally.add(np.diff(dataset.document_offsets[first : first + _PIECE + 1]))
    return tally


def tally_sequences(dataset: IndexedDataset) -> LengthTally:
    """Tokens per sequence; sequences are sentences if preprocessing split the documents."""
    tally = LengthTally()
    for first in range(0, dataset.num_sequences, _PIECE):
        tally.add(np.asarray(dataset.sequence_lengths[first : first + _PIECE]))
    return tally


def has_sentences(dataset: IndexedDataset) -> bool:
    """Whether any document has more than one sequence."""
    return any(
        (np.diff(dataset.document_indices[first : first + _PIECE + 1]) > 1).any()
        for first in range(0, dataset.num_documents, _PIECE)
    )
