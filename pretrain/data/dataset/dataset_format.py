"""The layout of datasets on disk, shared by reader and writer: Megatron's MMIDIDX files.

A dataset is PREFIX.bin (token ids only), PREFIX.idx (where sequences begin) and PREFIX.json (the manifest, absent from
Megatron's own datasets). PREFIX.idx, little-endian, without gaps, with n sequences and m document-index entries:

    offset 0    9 bytes     magic b"MMIDIDX\\x00\\x00"
           9    uint64      version, 1
          17    uint8       dtype code: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16
                            (6 float64, 7 float32 exist in Megatron and are refused: they hold no token ids)
          18    uint64      n
          26    uint64      m, the number of documents + 1
          34    int32[n]    tokens per sequence
                int64[n]    byte offset of each sequence in PREFIX.bin; contiguous from 0
                int64[m]    first sequence of each document, then n
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from pretrain.config.dataset_names import prefix_of as prefix_of

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER_BYTES = 34
DTYPE_OF_CODE = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
CODE_OF_DTYPE = {name: code for code, name in DTYPE_OF_CODE.items()}
MAX_SEQUENCE_TOKENS = 2**31 - 1  # lengths are int32


def dataset_path(prefix: str | Path, suffix: str) -> Path:
    """`prefix` + `suffix` (".bin", ".idx", ".json"); dots in the prefix are kept."""
    return Path(f"{prefix}{suffix}")


class IndexArrays(NamedTuple):
    """The mapped arrays of PREFIX.idx: tokens and byte offset per sequence, first sequence of each document."""

    lengths: np.ndarray
    pointers: np.ndarray
    documents: np.ndarray


def map_index(path: Path, num_sequences: int, num_entries: int) -> IndexArrays:
    """The arrays of the index file `path` with these numbers of sequences and document-index entries; unchecked."""
    pointers_first = HEADER_BYTES + 4 * num_sequences
    return IndexArrays(
        lengths=map_array(path, "<i4", HEADER_BYTES, num_sequences),
        pointers=map_array(path, "<i8", pointers_first, num_sequences),
        documents=map_array(path, "<i8", pointers_first + 8 * num_sequences, num_entries),
    )


def map_array(path: Path, dtype: np.typing.DTypeLike, offset: int, count: int) -> np.ndarray:
    """`count` elements of the file `path` from byte `offset` on, mapped read-only."""
    if count == 0:  # an empty range cannot be mapped
        return np.empty(0, dtype)
    # A plain view: slicing np.memmap objects costs several times as much.
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,)).view(np.ndarray)
