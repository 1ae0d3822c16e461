"""Token datasets on disk: a strict, memory-mapped, torch-free reader of Megatron's MMIDIDX files.

Preprocessing writes token ids once (`dataset_writer`); the sample index reads them in any order through this module.
The file layout is documented in `dataset_format`.

The files are mapped, not copied: truncating one while it is open kills the process with SIGBUS, which no check at
opening can prevent. This project's programs replace datasets by renaming, which leaves open ones intact.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pretrain.data.dataset import foreign
from pretrain.data.dataset.dataset_format import (
    DTYPE_OF_CODE,
    HEADER_BYTES,
    MAGIC,
    VERSION,
    dataset_path,
    map_array,
    map_index,
    prefix_of,
)
from pretrain.data.dataset.manifest import REMEDY, Manifest
from pretrain.errors import DataError

# Elements per step: bounds the memory of every check, and the sums, which could otherwise overflow.
_CHUNK = 1 << 20


class IndexedDataset:
    """One dataset, opened read-only; opening checks every header field against the actual file sizes.

    Attributes:
        prefix: the path without suffix.
        dtype: of the token ids on disk.
        num_sequences, num_documents, num_tokens: counts.
        sequence_lengths: int32 [num_sequences], tokens.
        sequence_pointers: int64 [num_sequences], bytes from the start of PREFIX.bin.
        document_indices: int64 [num_documents + 1], first sequence of each document.
        document_offsets: int64 [num_documents + 1], first token of each document; aligned and in memory.
        tokens: `dtype` [num_tokens], mapped.
        manifest: of PREFIX.json, None if there is no such file.
    """

    def __init__(self, prefix: str | Path) -> None:
        """Opens PREFIX.bin and PREFIX.idx; `prefix` may also be the name of one of them, or of PREFIX.json.

        Raises:
            DataError: a file is missing, cannot be read, is of another program's kind, or is invalid; names the file,
                the field, its expected and its actual value.
        """
        self.prefix = prefix_of(str(prefix))
        self.bin_path, self.idx_path = dataset_path(self.prefix, ".bin"), dataset_path(self.prefix, ".idx")
        self._bin_bytes, self._idx_bytes = file_size(self.prefix, ".bin"), file_size(self.prefix, ".idx")
        self.dtype, self.num_sequences, num_entries = self._read_header()
        self.num_documents = num_entries - 1
        arrays = map_index(self.idx_path, self.num_sequences, num_entries)
        self.sequence_lengths, self.sequence_pointers, self.document_indices = arrays
        self.num_tokens = self._check_sequences() // self.dtype.itemsize
        self._check_documents()
        self.tokens = map_array(self.bin_path, self.dtype.str, 0, self.num_tokens)
        self.document_offsets = self._find_document_offsets()
        self.manifest = self._load_manifest()

    def __len__(self) -> int:
        return self.num_documents

    def document(self, index: int) -> np.ndarray:
        """Token ids of document `index` (0 <= index < num_documents), all its sequences together; a mapped view."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"{self.prefix}: document {index} of {self.num_documents}")
        return self.tokens[self.document_offsets[index] : self.document_offsets[index + 1]]

    def _read_header(self) -> tuple[np.dtype, int, int]:
        """Dtype, sequence count and document-index count; Python integers, so nothing overflows."""
        with self.idx_path.open("rb") as file:
            header = file.read(HEADER_BYTES)
        is_own = os.path.exists(dataset_path(self.prefix, ".json"))  # then it is damaged
        if not is_own and (words := foreign.explain(header, self._idx_bytes)) is not None:
            raise DataError(f"{self.idx_path}: {words}")
        if self._idx_bytes < HEADER_BYTES:
            self._refuse("size", f"at least {HEADER_BYTES} bytes", f"{self._idx_bytes}")
        if header[:9] != MAGIC:
            self._refuse("magic", f"{MAGIC!r}", f"{header[:9]!r}")
        version, code, num_sequences, num_entries = struct.unpack("<QBQQ", header[9:])
        if version != VERSION:
            self._refuse("version", f"{VERSION}", f"{version}")
        if code not in DTYPE_OF_CODE:
            self._refuse("dtype code", f"an integer type, one of {sorted(DTYPE_OF_CODE)}", f"{code}")
        expected_bytes = HEADER_BYTES + 12 * num_sequences + 8 * num_entries
        if expected_bytes != self._idx_bytes:
            counts = f"{num_sequences} sequences and {num_entries} document indices"
            self._refuse("size", f"{expected_bytes} bytes for {counts}", f"{self._idx_bytes}")
        return np.dtype(DTYPE_OF_CODE[code]).newbyteorder("<"), num_sequences, num_entries

    def _check_sequences(self) -> int:
        """Checks lengths, pointers and the size of PREFIX.bin against each other; returns bytes of tokens."""
        end = 0
        for first, last in _chunks(self.num_sequences):
            lengths = self.sequence_lengths[first:last].astype(np.int64)
            self._require(first, "sequence length", lengths >= 0, "at least ", np.zeros_like(lengths), lengths)
            stops = end + np.cumsum(lengths * self.dtype.itemsize)
            starts = np.concatenate(([end], stops[:-1]))
            pointers = np.asarray(self.sequence_pointers[first:last])
            self._require(first, "sequence pointer", pointers == starts, "", starts, pointers)
            end = int(stops[-1])
            if end > self._bin_bytes:  # before the next chunk, so that sums stay far from 2^63
                break
        if end != self._bin_bytes:
            more = "" if end <= self._bin_bytes else " or more"
            raise DataError(f"{self.bin_path}: expected {end}{more} bytes, found {self._bin_bytes}; {REMEDY}")
        return end

    def _check_documents(self) -> None:
        if self.num_documents < 0:
            self._refuse("document-index count", "1 or more", "0")
        previous = 0
        if self.document_indices[0] != 0:
            self._refuse("document index 0", "0", f"{self.document_indices[0]}")
        for first, last in _chunks(self.num_documents + 1):
            indices = np.asarray(self.document_indices[first:last])
            before = np.concatenate(([previous], indices[:-1]))
            self._require(first, "document index", indices >= before, "at least ", before, indices)
            previous = int(indices[-1])
        if previous != self.num_sequences:
            self._refuse("last document index", f"the sequence count {self.num_sequences}", f"{previous}")

    def _find_document_offsets(self) -> np.ndarray:
        offsets = np.empty(self.num_documents + 1, np.int64)
        for first, last in _chunks(self.num_documents + 1):
            sequence = self.document_indices[first:last]
            is_end = sequence == self.num_sequences
            offsets[first:last][is_end] = self.num_tokens
            offsets[first:last][~is_end] = self.sequence_pointers[sequence[~is_end]] // self.dtype.itemsize
        return offsets

    def _load_manifest(self) -> Manifest | None:
        path = dataset_path(self.prefix, ".json")
        if not path.exists():
            return None
        manifest = Manifest.load(path)
        for field, actual in (
            ("dtype", self.dtype.name),
            ("documents", self.num_documents),
            ("sequences", self.num_sequences),
            ("tokens", self.num_tokens),
            ("bin_bytes", self._bin_bytes),
            ("idx_bytes", self._idx_bytes),
        ):
            expected = getattr(manifest, field)
            if expected != actual:
                raise DataError(f"{path}: {field}: the manifest says {expected}, the dataset has {actual}; {REMEDY}")
        return manifest

    def _require(
        self, first: int, field: str, is_good: np.ndarray, relation: str, expected: np.ndarray, actual: np.ndarray
    ) -> None:
        """Raises DataError for the first bad entry; `first` is the number of the chunk's first entry."""
        if not is_good.all():
            first_bad = int(np.argmin(is_good))
            self._refuse(f"{field} {first + first_bad}", f"{relation}{expected[first_bad]}", f"{actual[first_bad]}")

    def _refuse(self, field: str, expected: str, actual: str) -> None:
        raise DataError(f"{self.idx_path}: {field}: expected {expected}, found {actual}; {REMEDY}")


def file_size(prefix: str | Path, suffix: str) -> int:
    """Bytes of PREFIX + `suffix`, which exists and can be read.

    Raises:
        DataError: it is missing, not a file, or cannot be read.
    """
    path, other = dataset_path(prefix, suffix), dataset_path(prefix, ".idx" if suffix == ".bin" else ".bin")
    if os.path.exists(path) and not os.path.isfile(path):
        raise DataError(f"{path}: is not a file; a dataset prefix is the path without .bin/.idx")
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size
    except FileNotFoundError as error:
        if os.path.exists(other):
            hint = f"it belongs beside {other}; copy it there from where the dataset was made"
        elif os.path.isdir(prefix):
            hint = f"{prefix} is a folder; give the prefix of a dataset in it, the path without .bin/.idx"
        else:
            hint = "give the prefix of a dataset, the path without .bin/.idx; `taco data preprocess` makes one"
        raise DataError(f"{path}: {error.strerror}; {hint}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _chunks(count: int) -> Iterator[tuple[int, int]]:
    for first in range(0, count, _CHUNK):
        yield first, min(first + _CHUNK, count)
