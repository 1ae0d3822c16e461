"""One dataset for training, validation and test: a document's hash decides which split it belongs to.

The hash (xxh64 of the token ids as int32) depends on the document alone. So a document stays in its split when data is
appended, merged or reordered, and equal documents are in the same split.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pretrain.config.sections import SplitsSection
from pretrain.data.native import native
from pretrain.data.sample_index import TokenRuns

_HASHES = 2**64


@dataclass(frozen=True)
class Split:
    """The documents whose hash lies in first * 2^64 .. end * 2^64 - 1; `first` and `end` lie in 0 .. 1."""

    name: str
    first: float
    end: float

    def contains(self, hashes: np.ndarray) -> np.ndarray:
        """Bool [n] for uint64 hashes [n]."""
        first, end = int(self.first * _HASHES), int(self.end * _HASHES)
        is_inside = hashes >= np.uint64(first) if first < _HASHES else np.zeros(len(hashes), np.bool_)
        return is_inside & (hashes < np.uint64(end)) if end < _HASHES else is_inside


def split_named(splits: SplitsSection, name: str) -> Split:
    """Split `name` of the three, which cover 0 to 1 in order without gaps; see `data.splits`."""
    borders = {
        "train": (0.0, splits.train),
        "validation": (splits.train, splits.train + splits.validation),
        "test": (splits.train + splits.validation, 1.0),
    }
    if not splits.test:  # what rounding leaves over belongs to the last split that is not empty
        last = "validation" if splits.validation else "train"
        borders[last] = (borders[last][0], 1.0)
    return Split(name, *borders[name])


def hash_documents(tokens: np.ndarray, document_offsets: np.ndarray, num_threads: int = 1) -> np.ndarray:
    """uint64 [num_documents]: xxh64 of the ids of each document as little-endian int32, whatever the dtype.

    Raises:
        ValueError: offsets decrease or are out of range.
    """
    return native().hash_documents(tokens, document_offsets, num_threads)


@dataclass(frozen=True)
class Selection:
    """The documents of a split: a mask, their offsets among the split's tokens (int64 [n + 1]), and where those are."""

    is_kept: np.ndarray
    offsets: np.ndarray
    runs: TokenRuns


def select(document_offsets: np.ndarray, is_kept: np.ndarray) -> Selection:
    """The documents of `document_offsets` (int64 [n + 1]) that `is_kept` (bool [n]) selects; drops empty ones."""
    is_kept = is_kept & (document_offsets[1:] > document_offsets[:-1])
    begins, ends = document_offsets[:-1][is_kept], document_offsets[1:][is_kept]
    offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(ends - begins)))
    opens_run = np.ones(len(begins), np.bool_)
    opens_run[1:] = begins[1:] != ends[:-1]
    return Selection(is_kept, offsets, TokenRuns(offsets[:-1][opens_run], begins[opens_run]))
