"""Leaves out documents whose token ids equal those of an earlier one: the second pass of `--dedup`.

The first pass collects all documents in temporary files. Here they are hashed, compared token by token if their hashes
agree, and those to keep are copied into the dataset. Data per document (24 bytes) is in mapped files, and the hash
table is divided into parts that fit the memory limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.data.dataset.dataset_format import map_array
from pretrain.data.dataset.dataset_writer import IndexedDatasetWriter, explain_os_errors
from pretrain.data.dataset.manifest import Dropped
from pretrain.data.native import native
from pretrain.errors import DataError

_ENTRY_BYTES = 24
_MAX_PARTS = 1 << 20
_DOCUMENTS_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class RawDocuments:
    """Documents as a writer leaves them before it writes the index, mapped into memory.

    `tokens` [t]; `lengths` int32 [s], tokens per sequence; `documents` int64 [d + 1], first sequence of each document.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    documents: np.ndarray

    @classmethod
    def open(cls, prefix: str, dtype: np.dtype) -> RawDocuments:
        """Opens the temporary files of a writer on `prefix`, which must have flushed them to disk."""
        files = (("bin", dtype), ("lengths", np.dtype("<i4")), ("documents", np.dtype("<i8")))
        paths = [(Path(f"{prefix}.{name}.tmp"), kind) for name, kind in files]
        return cls(*(map_array(path, kind, 0, path.stat().st_size // kind.itemsize) for path, kind in paths))

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return self.documents.size - 1


def copy_unique(
    raw: RawDocuments,
    writer: IndexedDatasetWriter,
    *,
    memory: int,
    threads: int = 1,
    check_stop: Callable[[], None] = lambda: None,
    max_bytes: int = 16 << 20,
) -> Dropped:
    """Adds the first of each set of equal documents to `writer`, in order; returns what was left out.

    `memory` limits the hash table; `max_bytes` of tokens are copied at once, or one longer document.

    Raises:
        DataError: the disk is full, or `memory` is far too small for the number of documents.
    """
    dropped_documents = dropped_tokens = 0
    with _scratch_files(writer.prefix, raw.num_documents) as (offsets, hashes, is_duplicate):
        _find_offsets(raw, offsets)
        _find_duplicates(raw, offsets, hashes, is_duplicate, memory, threads, check_stop)
        itemsize = raw.tokens.dtype.itemsize
        for first, last in _ranges(offsets, max_bytes):
            check_stop()
            keep = is_duplicate[first:last] == 0
            ends = offsets[first : last + 1] // itemsize
            sizes = np.diff(ends)
            tokens = raw.tokens[ends[0] : ends[-1]]
            sequences = raw.documents[first : last + 1]
            lengths, counts = raw.lengths[sequences[0] : sequences[-1]], np.diff(sequences)
            if not keep.all():
                tokens, lengths = tokens[np.repeat(keep, sizes)], lengths[np.repeat(keep, counts)]
                counts = counts[keep]
                dropped_documents += int((~keep).sum())
                dropped_tokens += int(sizes[~keep].sum())
            writer.add_documents(tokens, lengths, counts)
    return Dropped(documents=dropped_documents, tokens=dropped_tokens)


def _find_offsets(raw: RawDocuments, offsets: np.ndarray) -> None:
    """Fills `offsets` int64 [d + 1]: first byte of each document, then the end."""
    end, itemsize = 0, raw.tokens.dtype.itemsize
    offsets[0] = 0
    for first in range(0, raw.num_documents, _DOCUMENTS_AT_ONCE):
        sequences = raw.documents[first : first + _DOCUMENTS_AT_ONCE + 1]
        lengths = raw.lengths[sequences[0] : sequences[-1]].astype(np.int64)
        sums = np.concatenate(([0], np.cumsum(lengths))) * itemsize
        offsets[first + 1 : first + sequences.size] = end + sums[sequences[1:] - sequences[0]]
        end += int(sums[-1])


def _find_duplicates(
    raw: RawDocuments,
    offsets: np.ndarray,
    hashes: np.ndarray,
    is_duplicate: np.ndarray,
    memory: int,
    threads: int,
    check_stop: Callable[[], None],
) -> None:
    num_parts = max(-(-_ENTRY_BYTES * raw.num_documents // memory), 1)
    if num_parts > _MAX_PARTS:
        raise DataError(f"--memory {memory}: too little for {raw.num_documents} documents; give at least 1G")
    data = raw.tokens.view(np.uint8)
    native().hash_documents(data, offsets, threads, hashes)
    for part in range(num_parts):
        check_stop()
        native().mark_duplicates(data, offsets, hashes, part, num_parts, threads, is_duplicate)


def _ranges(offsets: np.ndarray, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of consecutive documents of at most `max_bytes` together, with at least one document each."""
    first, count = 0, offsets.size - 1
    while first < count:
        window = offsets[first + 1 : first + 1 + _DOCUMENTS_AT_ONCE]
        last = first + max(int(np.searchsorted(window, offsets[first] + max_bytes, "right")), 1)
        yield first, last
        first = last


@contextmanager
def _scratch_files(prefix: str, num_documents: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Offsets int64 [d + 1], hashes uint64 [d, 2] and marks uint8 [d] in mapped files, initially zero."""
    shapes = {
        "offsets": (np.int64, (num_documents + 1,)),
        "hashes": (np.uint64, (num_documents, 2)),
        "marks": (np.uint8, (num_documents,)),
    }
    paths = {name: Path(f"{prefix}.{name}.tmp") for name in shapes}
    try:
        with explain_os_errors(prefix):
            arrays = [_create(paths[name], np.dtype(kind), shape) for name, (kind, shape) in shapes.items()]
        yield arrays[0], arrays[1], arrays[2]
    finally:
        for path in paths.values():
            path.unlink(missing_ok=True)


def _create(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """A new mapped file, allocated in full now: a full disk is an error here instead of a crash at a later store."""
    if 0 in shape:
        return np.empty(shape, dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    with path.open("wb") as file:
        block = bytes(min(size, 1 << 20))
        for start in range(0, size, len(block)):
            file.write(block[: size - start])
    return np.memmap(path, dtype=dtype, mode="r+", shape=shape).view(np.ndarray)
