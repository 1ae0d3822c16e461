"""Files that survive a crash: hashed while they are written, fsynced, and put in place by rename.

The order is always the same: file content, fsync of the file, rename, fsync of the folder. Only then does a name on the
disk mean that its content is there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

SELF_HASH = "self_xxh3_128"
_READ_BYTES = 1 << 22
_NO_HASH = "0" * 32


@dataclass(frozen=True)
class FileRecord:
    """Name relative to its folder, size in bytes and xxh3-128 of a finished file."""

    name: str
    num_bytes: int
    xxh3_128: str


class HashingFile:
    """A write-only file that hashes what passes through, so that nothing has to be read back."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = xxhash.xxh3_128()
        self.num_bytes = 0

    def write(self, content: bytes | memoryview) -> int:
        """Write and hash; returns the number of bytes taken."""
        self._hash.update(content)
        self.num_bytes += len(content)
        return self._file.write(content)

    def flush(self) -> None:
        """Hand what is buffered to the operating system."""
        self._file.flush()

    def hexdigest(self) -> str:
        """xxh3-128 of everything written so far."""
        return self._hash.hexdigest()


@contextmanager
def hashing_writer(path: Path) -> Iterator[HashingFile]:
    """Open `path` for writing; on leaving, the content has reached the disk."""
    with path.open("wb") as file:
        writer = HashingFile(file)
        yield writer
        file.flush()
        os.fsync(file.fileno())


def record_of(path: Path, folder: Path) -> FileRecord:
    """Size and hash of a file as it lies on the disk."""
    digest = xxhash.xxh3_128()
    num_bytes = 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
            num_bytes += len(block)
    return FileRecord(path.relative_to(folder).as_posix(), num_bytes, digest.hexdigest())


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` at once: readers see the old file or the new one, also after a power loss."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def seal_json(tree: Mapping[str, Any]) -> str:
    """`tree` as JSON text whose last key, `self_xxh3_128`, is the hash of all the other bytes of the text."""
    text = json.dumps({**tree, SELF_HASH: _NO_HASH}, indent=1, ensure_ascii=False) + "\n"
    # A file name that is no UTF-8 arrives as lone surrogates; it becomes "?" rather than losing what is described.
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text.removesuffix(_seal(_NO_HASH)) + _seal(xxhash.xxh3_128_hexdigest(text.encode()))


def is_sealed(text: bytes) -> bool:
    """Whether `text` is, to the bit, what `seal_json` gave."""
    end = len(_seal(_NO_HASH))
    unsealed = text[:-end] + _seal(_NO_HASH).encode()
    return text[-end:] == _seal(xxhash.xxh3_128_hexdigest(unsealed)).encode()


def _seal(digest: str) -> str:
    return f'"{SELF_HASH}": "{digest}"\n}}\n'


def sync_file(path: Path) -> None:
    """Make the content of an already written file durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folders(folder: Path) -> None:
    """Make `folder` and what is missing above it, so that they are there after a power loss, too."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def folder_records(folder: Path) -> tuple[FileRecord, ...]:
    """Name, size and hash of every file in `folder`, by name; none where there is no such folder. Raises OSError."""
    if not folder.is_dir():
        return ()
    return tuple(record_of(path, folder) for path in sorted(folder.iterdir()) if path.is_file())


def find_damage(folder: Path, records: Iterable[FileRecord]) -> dict[Path, str]:
    """What differs between `folder` and the records of its files, by file; files not in them are ignored."""
    problems = {}
    for expected in records:
        path = folder / expected.name
        try:
            found = record_of(path, folder)
        except OSError as error:
            problems[path] = f"{error.strerror or 'cannot be read'}; restore it from a copy"
            continue
        if found.num_bytes != expected.num_bytes:
            problems[path] = f"expected {expected.num_bytes} bytes, found {found.num_bytes}; restore it from a copy"
        elif found != expected:
            problems[path] = f"expected xxh3-128 {expected.xxh3_128}, found {found.xxh3_128}; restore it from a copy"
    return problems
