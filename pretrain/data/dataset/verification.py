"""Checks a dataset against its manifest: every byte of PREFIX.bin, .idx, .json, the tokenizer's folder, index tables.

Every difference is reported with its location. Several threads hash chunks of PREFIX.bin, a few MiB of memory each.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from pretrain.data import index_cache
from pretrain.data.dataset.dataset_format import dataset_path
from pretrain.data.dataset.indexed_dataset import IndexedDataset
from pretrain.data.dataset.manifest import REMEDY, Manifest
from pretrain.durable import find_damage
from pretrain.errors import DataError

# A multiple of every token's size, so that no token is cut in two.
_BLOCK = 1 << 22

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Problem:
    """One problem: its file, the affected bytes (None: no particular ones) and a message."""

    file: str
    message: str
    bytes: tuple[int, int] | None = None

    def __str__(self) -> str:
        return f"{self.file}: {self.message}"


@dataclass
class Verification:
    """The result: problems (none for an intact dataset), and the counts of an intact dataset.

    `largest_id` and `empty_documents` are None unless every token was checked (`deep`).
    """

    prefix: str
    problems: list[Problem] = field(default_factory=list)
    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    largest_id: int | None = None
    empty_documents: int | None = None


class _IdScan:
    """Looks for token ids outside the vocabulary in blocks of PREFIX.bin."""

    def __init__(self, manifest: Manifest) -> None:
        self._dtype, self._vocab_size = np.dtype(manifest.dtype).newbyteorder("<"), manifest.tokenizer.vocab_size
        self.largest_id, self.num_outside = 0, 0
        self.first_outside: tuple[int, int] | None = None  # byte offset, token id

    def update(self, block: bytes, first_byte: int) -> None:
        ids = np.frombuffer(block, self._dtype)
        largest, smallest = int(ids.max()), int(ids.min())
        self.largest_id = max(self.largest_id, largest)
        if largest < self._vocab_size and smallest >= 0:
            return
        outside = np.flatnonzero((ids >= self._vocab_size) | (ids < 0))
        self.num_outside += len(outside)
        position = int(outside[0])
        self.first_outside = self.first_outside or (first_byte + position * ids.itemsize, int(ids[position]))


@dataclass(frozen=True)
class _Chunk:
    """The result of reading one chunk of PREFIX.bin: a hash or the operating system's error, and ids if requested."""

    digest: str = ""
    complaint: str = ""
    ids: _IdScan | None = None


def count_bytes(prefix: str | Path) -> int:
    """Bytes that `check` reads: those of PREFIX.bin and PREFIX.idx if they exist."""
    paths = [dataset_path(prefix, suffix) for suffix in (".bin", ".idx")]
    return sum(path.stat().st_size for path in paths if os.path.isfile(path))


def check(
    prefix: str | Path, *, threads: int = 1, deep: bool = False, on_progress: Progress = lambda num_bytes: None
) -> Verification:
    """Every problem of the dataset; `deep` also checks every token id.

    `on_progress` is called with the number of bytes read, from any thread.
    """
    result = Verification(str(prefix))
    json_path = dataset_path(prefix, ".json")
    if not os.path.exists(json_path):
        result.problems = _without_manifest(prefix)
        return result
    try:
        manifest = Manifest.load(json_path)
    except DataError as error:
        # Nothing else can be checked against hashes that may be wrong themselves.
        result.problems = [_from_error(prefix, error)]
        return result
    result.problems = _check_index(prefix, manifest, on_progress)
    result.problems += _check_tokens(prefix, manifest, threads, result if deep else None, on_progress)
    result.problems += _check_tokenizer(prefix, manifest) + _check_tables(prefix)
    if not result.problems:
        _describe(prefix, result, deep)
    return result


def _without_manifest(prefix: str | Path) -> list[Problem]:
    try:
        IndexedDataset(prefix)
    except DataError as error:
        return [_from_error(prefix, error)]
    return [Problem(str(dataset_path(prefix, ".json")), "there is no manifest, so the content cannot be checked")]


def _describe(prefix: str | Path, result: Verification, deep: bool) -> None:
    try:
        dataset = IndexedDataset(prefix)
    except DataError as error:  # written like this: the hashes match, but the content is invalid
        result.problems.append(_from_error(prefix, error))
        return
    result.documents, result.sequences, result.tokens = dataset.num_documents, dataset.num_sequences, dataset.num_tokens
    if deep:
        result.empty_documents = int(np.count_nonzero(np.diff(dataset.document_offsets) == 0))


def _check_index(prefix: str | Path, manifest: Manifest, on_progress: Progress) -> list[Problem]:
    path = dataset_path(prefix, ".idx")
    try:
        num_bytes = path.stat().st_size
        if num_bytes != manifest.idx_bytes:
            return [_wrong_size(path, manifest.idx_bytes, num_bytes)]
        digest = xxhash.xxh64()
        for block in _blocks(path, 0, num_bytes):
            digest.update(block)
            on_progress(len(block))
    except OSError as error:
        return [_unreadable(path, error)]
    if digest.hexdigest() == manifest.idx_xxh64:
        return []
    difference = f"bytes 0 to {num_bytes}: expected xxh64 {manifest.idx_xxh64}, found {digest.hexdigest()}"
    return [Problem(str(path), f"{difference}; {_contradiction(prefix)}", (0, num_bytes))]


def _contradiction(prefix: str | Path) -> str:
    """The first field of PREFIX.idx that contradicts others, with the remedy; only the remedy if none does."""
    try:
        IndexedDataset(prefix)
    except DataError as error:
        problem = _from_error(prefix, error)
        if problem.file == str(dataset_path(prefix, ".idx")):
            return problem.message
    return REMEDY


def _check_tokens(
    prefix: str | Path, manifest: Manifest, threads: int, deep: Verification | None, on_progress: Progress
) -> list[Problem]:
    path = dataset_path(prefix, ".bin")
    try:
        size = path.stat().st_size
    except OSError as error:
        return [_unreadable(path, error)]
    problems = [] if size == manifest.bin_bytes else [_wrong_size(path, manifest.bin_bytes, size)]
    for number, chunk in enumerate(_read_chunks(path, size, manifest, threads, deep is not None, on_progress)):
        first = number * manifest.chunk_bytes
        end = min(first + manifest.chunk_bytes, manifest.bin_bytes)
        where = f"chunk {number}, bytes {first} to {end}"
        if chunk.complaint:
            problems.append(Problem(str(path), f"{where}: cannot be read: {chunk.complaint}; {REMEDY}", (first, end)))
        elif chunk.digest != manifest.bin_xxh64[number]:
            message = f"{where}: expected xxh64 {manifest.bin_xxh64[number]}, found {chunk.digest}; {REMEDY}"
            problems.append(Problem(str(path), message, (first, end)))
        elif deep is not None and chunk.ids is not None:
            deep.largest_id = max(deep.largest_id or 0, chunk.ids.largest_id)
            problems += _outside_vocabulary(path, chunk.ids, manifest.tokenizer.vocab_size)
    return problems


def _check_tokenizer(prefix: str | Path, manifest: Manifest) -> list[Problem]:
    """Problems of the folder PREFIX.tokenizer: changed files, or another tokenizer than the one that made the ids."""
    from pretrain.data.tokenizer.load import find_dataset_tokenizer

    folder = dataset_path(prefix, ".tokenizer")
    try:
        damage = find_damage(folder, manifest.tokenizer_files)
    except OSError as error:
        return [Problem(str(error.filename or folder), f"cannot be read: {error.strerror or error}")]
    if damage:
        return [Problem(str(path), f"{message}; restore it from a copy") for path, message in damage.items()]
    try:
        find_dataset_tokenizer(prefix, manifest.tokenizer)
    except DataError as error:
        return [Problem(str(folder), str(error).removeprefix(f"{folder}: "))]
    return []


def _check_tables(prefix: str | Path) -> list[Problem]:
    """Damaged index tables in PREFIX.index; each holds its own hash."""
    problems = []
    for path in sorted(dataset_path(prefix, ".index").glob("*.index")):
        if (complaint := index_cache.find_damage(path)) is not None:
            problems.append(Problem(str(path), f"is damaged: {complaint}; remove it, and it is built again"))
    return problems


def _read_chunks(
    path: Path, size: int, manifest: Manifest, threads: int, deep: bool, on_progress: Progress
) -> Iterator[_Chunk]:
    """The complete chunks of a file of `size` bytes, in order."""
    lock = threading.Lock()

    def read(number: int) -> _Chunk:
        first = number * manifest.chunk_bytes
        end = min(first + manifest.chunk_bytes, manifest.bin_bytes)
        return _read_chunk(path, first, end, _IdScan(manifest) if deep else None, advance)

    def advance(num_bytes: int) -> None:
        with lock:
            on_progress(num_bytes)

    num_whole = min(size // manifest.chunk_bytes, len(manifest.bin_xxh64))
    num_chunks = len(manifest.bin_xxh64) if size >= manifest.bin_bytes else num_whole
    executor = ThreadPoolExecutor(max(threads, 1), thread_name_prefix="taco-verify")
    try:
        yield from executor.map(read, range(num_chunks))
    finally:
        executor.shutdown(wait=True, cancel_futures=True)  # an interrupted check must not process the rest of its queue


def _read_chunk(path: Path, first: int, end: int, ids: _IdScan | None, on_progress: Progress) -> _Chunk:
    digest = xxhash.xxh64()
    try:
        for block in _blocks(path, first, end):
            digest.update(block)
            if ids is not None:
                ids.update(block, first)
            first += len(block)
            on_progress(len(block))
    except OSError as error:
        return _Chunk(complaint=error.strerror or "unknown reason")
    return _Chunk(digest.hexdigest(), ids=ids)


def _outside_vocabulary(path: Path, ids: _IdScan, vocab_size: int) -> list[Problem]:
    if ids.first_outside is None:
        return []
    byte, token_id = ids.first_outside
    message = (
        f"byte {byte}: token id {token_id} is not in the vocabulary of {vocab_size}, nor are {ids.num_outside - 1} "
        "more in this chunk, and so it was written; preprocess again with the right tokenizer"
    )
    return [Problem(str(path), message, (byte, byte + 1))]


def _blocks(path: Path, first: int, end: int) -> Iterator[bytes]:
    # Unbuffered: the blocks are large, and a bad sector then loses no more than its own block.
    with path.open("rb", buffering=0) as file:
        while first < end:
            block = os.pread(file.fileno(), min(_BLOCK, end - first), first)
            if not block:
                raise OSError(0, f"the file ends at byte {first}")
            # A short read may end within a token; keep whole tokens only, the rest is read again.
            block = block[: len(block) - len(block) % 8] or block
            first += len(block)
            yield block


def _wrong_size(path: Path, expected: int, actual: int) -> Problem:
    bytes_ = (actual, expected) if actual < expected else (expected, actual)
    return Problem(str(path), f"expected {expected} bytes, found {actual}; {REMEDY}", bytes_)


def _unreadable(path: Path, error: OSError) -> Problem:
    hint = "; a dataset prefix is the path without .bin/.idx" if isinstance(error, FileNotFoundError) else ""
    return Problem(str(path), f"cannot be read: {error.strerror or error}{hint}")


def _from_error(prefix: str | Path, error: DataError) -> Problem:
    """The problem of an error from reader or manifest, whose messages begin with their file."""
    for suffix in (".bin", ".idx", ".json"):
        file = str(dataset_path(prefix, suffix))
        if str(error).startswith(f"{file}: "):
            return Problem(file, str(error)[len(file) + 2 :])
    return Problem(str(prefix), str(error))


def verify(prefix: str | Path) -> list[str]:
    """Every problem of the dataset, one sentence each; [] if it is intact. `verification.check` reports more."""
    return [str(problem) for problem in check(prefix).problems]
