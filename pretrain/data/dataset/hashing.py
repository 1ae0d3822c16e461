"""xxh64 of files: of a range, and of what is just being written.

The writer of datasets records these in the manifest, `verification` computes them again. They find damage, not malice.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import xxhash

_BLOCK = 1 << 20


class HashingFile:
    """A file being written that hashes each `chunk_bytes` of what passes through."""

    def __init__(self, path: Path, chunk_bytes: int, num_bytes: int = 0, digests: Sequence[str] = ()) -> None:
        """Opens `path`; its first `num_bytes`, whose chunks have the hashes `digests`, stay, the rest is cut off."""
        self.num_bytes = num_bytes
        self._chunk_bytes = chunk_bytes
        self._file = path.open("r+b" if num_bytes else "wb")
        num_done = num_bytes // chunk_bytes
        self._done = list(digests[:num_done])
        self._digest, self._left = xxhash.xxh64(), chunk_bytes
        for block in _read_range(path, num_done * chunk_bytes, num_bytes):
            self._digest.update(block)
            self._left -= len(block)
        self._file.truncate(num_bytes)
        self._file.seek(num_bytes)

    def write(self, data: bytes | memoryview) -> None:
        """Appends `data`."""
        self._file.write(data)
        self.num_bytes += len(data)
        rest = memoryview(data)
        while len(rest) >= self._left:
            self._digest.update(rest[: self._left])
            self._done.append(self._digest.hexdigest())
            rest, self._digest, self._left = rest[self._left :], xxhash.xxh64(), self._chunk_bytes
        self._digest.update(rest)
        self._left -= len(rest)

    def digests(self) -> list[str]:
        """xxh64 of every chunk so far, the last one shorter; none for an empty file."""
        return self._done + ([self._digest.hexdigest()] if self._left < self._chunk_bytes else [])

    def sync(self) -> None:
        """Brings everything to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def hash_range(path: Path, first: int, end: int) -> str:
    """xxh64 of bytes `first` to `end` of a file; reads 1 MiB at a time."""
    digest = xxhash.xxh64()
    for block in _read_range(path, first, end):
        digest.update(block)
    return digest.hexdigest()


def _read_range(path: Path, first: int, end: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(first)
        while first < end and (block := file.read(min(_BLOCK, end - first))):
            first += len(block)
            yield block
