"""Files that survive a crash: hashed while they are written, fsynced, and published by rename.

The order is always the same: file content, fsync of the file, rename, fsync of the folder. Only then does a file name
on disk guarantee its content.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import xxhash

SELF_HASH = "self_xxh3_128"
_READ_BYTES = 1 << 22
_NO_HASH = "0" * 32
_NO_CHUNKS = 2**63 - 1
SealedPart = Literal["text", "content"]


@dataclass(frozen=True)
class FileRecord:
    """Name relative to its folder, size in bytes and xxh3-128 of a finished file."""

    name: str
    num_bytes: int
    xxh3_128: str


class Digest(Protocol):
    """The common interface of `xxhash`'s hashes."""

    def update(self, data: bytes | memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


class HashingFile:
    """A file that hashes its content while it is written, so that nothing has to be read back.

    Every chunk of `chunk_bytes` has its own hash, and so has the shorter last one; without chunks, one hash covers the
    whole file.
    """

    def __init__(
        self,
        path: Path,
        new_digest: Callable[[], Digest] = xxhash.xxh3_128,
        chunk_bytes: int | None = None,
        *,
        num_bytes: int = 0,
        digests: Sequence[str] = (),
    ) -> None:
        """Opens `path`; keeps its first `num_bytes`, whose chunks have the hashes `digests`, and truncates the rest."""
        self.num_bytes = num_bytes
        self._new_digest, self._chunk_bytes = new_digest, chunk_bytes or _NO_CHUNKS
        self._file = path.open("r+b" if num_bytes else "wb")
        num_done = num_bytes // self._chunk_bytes
        self._done = list(digests[:num_done])
        self._digest, self._left = new_digest(), self._chunk_bytes
        for block in _read_range(path, num_done * self._chunk_bytes, num_bytes):
            self._digest.update(block)
            self._left -= len(block)
        self._file.truncate(num_bytes)
        self._file.seek(num_bytes)

    def write(self, content: bytes | memoryview) -> int:
        """Append and hash; returns the number of bytes written."""
        num_written = self._file.write(content)
        self.num_bytes += len(content)
        rest = memoryview(content)
        while len(rest) >= self._left:
            self._digest.update(rest[: self._left])
            self._done.append(self._digest.hexdigest())
            rest, self._digest, self._left = rest[self._left :], self._new_digest(), self._chunk_bytes
        self._digest.update(rest)
        self._left -= len(rest)
        return num_written

    def hexdigest(self) -> str:
        """The hash of everything written so far; only for a file without chunks."""
        return self._digest.hexdigest()

    def digests(self) -> list[str]:
        """The hash of every chunk so far, also of the incomplete last one; none for an empty file."""
        return self._done + ([self._digest.hexdigest()] if self._left < self._chunk_bytes else [])

    def sync(self) -> None:
        """Flush everything to disk (fsync)."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@contextmanager
def hashing_writer(path: Path) -> Iterator[HashingFile]:
    """Open `path` for writing; on exit, the content is on disk."""
    with closing(HashingFile(path)) as file:
        yield file
        file.sync()


def write_bytes(folder: Path, name: str, content: bytes) -> FileRecord:
    """Write a small file durably to `folder`/`name`, whose parent is made; its record. Raises OSError."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    with hashing_writer(path) as file:
        file.write(content)
    return FileRecord(name, file.num_bytes, file.hexdigest())


def hash_range(path: Path, first: int, end: int, new_digest: Callable[[], Digest] = xxhash.xxh64) -> str:
    """The hash of bytes `first` to `end` of a file, or of those that exist; reads a bounded piece at a time."""
    digest = new_digest()
    for block in _read_range(path, first, end):
        digest.update(block)
    return digest.hexdigest()


def record_of(path: Path, folder: Path) -> FileRecord:
    """Size and hash of a file on disk."""
    num_bytes = path.stat().st_size
    return FileRecord(path.relative_to(folder).as_posix(), num_bytes, hash_range(path, 0, num_bytes, xxhash.xxh3_128))


def _read_range(path: Path, first: int, end: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(first)
        while first < end and (block := file.read(min(_READ_BYTES, end - first))):
            first += len(block)
            yield block


def write_text(path: Path, text: str) -> None:
    """Replace `path` atomically with `text`: readers see the old file or the new one, even after a power loss."""
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


def seal_json(tree: Mapping[str, Any], over: SealedPart) -> str:
    """`tree` as JSON text that contains its own hash under `self_xxh3_128`; `over` says what is hashed.

    There are two forms because files of both are in use. "text", for datasets: the hash of all other bytes, so no bit
    may differ; it is the last key. "content", for checkpoints: the hash of the object, whatever its layout; all keys
    are sorted.
    """
    if over == "content":
        plain = json.loads(json.dumps(tree))
        return json.dumps(plain | {SELF_HASH: _hash_content(plain)}, indent=1, sort_keys=True) + "\n"
    text = json.dumps({**tree, SELF_HASH: _NO_HASH}, indent=1, ensure_ascii=False) + "\n"
    # A file name that is not UTF-8 arrives as lone surrogates; they become "?", so that the description can be saved.
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text.removesuffix(_seal(_NO_HASH)) + _seal(xxhash.xxh3_128_hexdigest(text.encode()))


def is_sealed(text: bytes, over: SealedPart) -> bool:
    """Whether `text`, a JSON object, is what `seal_json` returned for the same `over`: bit for bit, or as an object.

    Raises:
        ValueError: `over` is "content" and `text` is not JSON.
    """
    if over == "content":
        tree = json.loads(text.decode("utf-8"))
        return tree.pop(SELF_HASH, None) == _hash_content(tree)
    end = len(_seal(_NO_HASH))
    unsealed = text[:-end] + _seal(_NO_HASH).encode()
    return text[-end:] == _seal(xxhash.xxh3_128_hexdigest(unsealed)).encode()


def _seal(digest: str) -> str:
    return f'"{SELF_HASH}": "{digest}"\n}}\n'


def _hash_content(tree: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(tree, sort_keys=True).encode())


def follow_umask(path: Path) -> None:
    """Give a file that a library created for its owner alone (safetensors, tempfile) the mode that the umask leaves."""
    with suppress(PermissionError):  # some network disks have no modes
        path.chmod(0o666 & ~_umask())


def _umask() -> int:
    """The umask of this process; reading it by setting it would show in files that other threads create meanwhile."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    except OSError:
        pass
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def sync_file(path: Path) -> None:
    """Make the content of a file written earlier durable."""
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
    """Create `folder` and its missing parents, so that they survive a power loss."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def folder_records(folder: Path) -> tuple[FileRecord, ...]:
    """Name, size and hash of every file in `folder`, sorted by name; none if the folder is missing. Raises OSError."""
    if not folder.is_dir():
        return ()
    return tuple(record_of(path, folder) for path in sorted(folder.iterdir()) if path.is_file())


# A name that leads nowhere, or to something other than a file: all that an error of the system says about content.
ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


def find_damage(
    folder: Path, records: Iterable[FileRecord], *, reads_content: bool = True, may_be_longer: bool = False
) -> dict[Path, str]:
    """What differs between `folder` and the records of its files, by file; files without a record are ignored.

    Args:
        reads_content: compare hashes; otherwise only sizes.
        may_be_longer: a file that is longer than its record says is no damage.

    Raises:
        OSError: a file is there and cannot be read, which says nothing about what it holds.
    """
    damage = {}
    for expected in records:
        path = folder / expected.name
        try:
            num_bytes = path.stat().st_size
            if num_bytes < expected.num_bytes or (num_bytes > expected.num_bytes and not may_be_longer):
                damage[path] = f"expected {expected.num_bytes} bytes, found {num_bytes}"
            elif reads_content and (digest := record_of(path, folder).xxh3_128) != expected.xxh3_128:
                damage[path] = (
                    f"expected xxh3-128 {expected.xxh3_128}, found {digest}: content differs from what was written"
                )
        except ABSENT:
            damage[path] = "is missing"
        except OSError as error:
            error.filename = error.filename or str(path)  # an error of reading does not know it
            raise
    return damage


def append_line(path: Path, line: bytes) -> None:
    """Append `line` and its end to a file, in one write.

    A last line without an end, left by a power loss or a full disk, is ended first, so that it swallows nothing.

    Raises:
        OSError: the file cannot be written; part of the line may be in it.
    """
    with path.open("a+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        is_torn = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"
        whole = (b"\n" if is_torn else b"") + line + b"\n"
        num_written = file.write(whole)
        if num_written != len(whole):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
