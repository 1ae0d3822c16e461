"""Recognises index files that are sound, but not of the kind that is read: other programs', and other options'.

A copy of such a file would be the same, so the error says what the file is and how to make one that is read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from pretrain.data.dataset.dataset_format import DTYPE_OF_CODE, HEADER_BYTES, MAGIC, VERSION

_OLD_MAGIC = b"TNTIDX\x00\x00"
_MAGIC_BYTES = len(MAGIC)
_FAIRSEQ_HEADER_BYTES = 26
# Megatron's floating-point types, and fairseq's wide ones.
_UNREAD_DTYPES = {6: "float64", 7: "float32", 9: "uint32", 10: "uint64"}
_MAX_VERSION = 255  # a larger one is damage
_OTHERS = [
    (b"\x1f\x8b", "compressed by gzip; unpack it with `gunzip`"),
    (b"\x28\xb5\x2f\xfd", "compressed by Zstandard; unpack it with `zstd -d`"),
    (b"\x93NUMPY", "a NumPy array; give a dataset that `taco data preprocess` made"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; fetch the file with `git lfs pull`"),
]
_AGAIN = "make the dataset again"


def explain(header: bytes, num_bytes: int) -> str | None:
    """What the index file with the first bytes `header` and `num_bytes` in all is, and the remedy; None: damaged."""
    return next(_explanations(header, num_bytes), None)


def _explanations(header: bytes, num_bytes: int) -> Iterator[str]:
    if header.startswith(_OLD_MAGIC):
        yield (
            "is an index of Megatron's and fairseq's old kind (TNTIDX, --dataset-impl cached or lazy), which is "
            f"not read; {_AGAIN} with --dataset-impl mmap"
        )
    for magic, words in _OTHERS:
        if header.startswith(magic):
            yield f"is {words}"
    if not header.startswith(MAGIC) or len(header) < _FAIRSEQ_HEADER_BYTES:
        return
    version = header[_MAGIC_BYTES : _MAGIC_BYTES + 8]
    if struct.unpack(">Q", version)[0] == VERSION:
        yield f"is written with the other byte order (big-endian); {_AGAIN} on a little-endian machine"
    number, code, num_sequences = struct.unpack("<QBQ", header[_MAGIC_BYTES:_FAIRSEQ_HEADER_BYTES])
    if number != VERSION:
        if number <= _MAX_VERSION:
            yield f"version: expected {VERSION}, found {number}; {_AGAIN} with a program that writes version {VERSION}"
        return
    if num_bytes == _FAIRSEQ_HEADER_BYTES + 12 * num_sequences:
        yield (
            "is an index of fairseq (--dataset-impl mmap), which has no documents and is not read; "
            f"{_AGAIN} from the text with `taco data preprocess`, or with Megatron's preprocess_data.py"
        )
    if len(header) < HEADER_BYTES:
        return
    (num_entries,) = struct.unpack("<Q", header[_FAIRSEQ_HEADER_BYTES:HEADER_BYTES])
    own_bytes = HEADER_BYTES + 12 * num_sequences + 8 * num_entries
    if num_sequences and num_bytes == own_bytes + num_sequences:
        yield (
            "is an index with modes (multimodal=True), which is not supported; "
            f"{_AGAIN} of its text alone, without multimodal"
        )
    if num_bytes == own_bytes and code in _UNREAD_DTYPES:
        yield (
            f"dtype code: expected an integer type, one of {sorted(DTYPE_OF_CODE)}, found {code}, which is "
            f"{_UNREAD_DTYPES[code]}; {_AGAIN} with such a type, for example int32"
        )
