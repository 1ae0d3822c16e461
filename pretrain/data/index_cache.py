"""Index tables on disk, looked up by what they were built from: built once, then mapped; damage is detected.

A table is a file NAME-KEY.index, where KEY is a hash of everything that determines its content. Little-endian:

    offset 0    8 bytes     magic b"TACOINDX"
           8    uint64      bytes of the header
          16    uint64      xxh64 of everything after it
          24    JSON        header: version, facts (what the table was built from), arrays [name, dtype, shape, offset]
                arrays      each at a multiple of 64

Processes that need the same table at once take a lock: one builds it, the others wait and map it. The lock is released
if the builder dies. If the file system has no locks, each process builds the table and publishes the same file.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pretrain import durable
from pretrain.errors import DataError
from pretrain.runlog import get_logger

log = get_logger(__name__)

VERSION = 1
Tables = dict[str, np.ndarray]

_MAGIC = b"TACOINDX"
_FIXED_BYTES = 24
_ALIGNMENT = 64
_DAMAGE = (OSError, ValueError, KeyError, TypeError, struct.error)
_HASHED_AT_ONCE = 1 << 24
_PATIENCE_SECONDS = 1800.0  # the longest wait for a builder, which may be suspended or on a dead node


def cached(
    name: str,
    facts: Mapping[str, Any],
    make: Callable[[], Tables],
    folders: Sequence[Path],
    *,
    must_store: bool = False,
) -> Tables:
    """The tables that `make` builds from what `facts` (plain JSON types) describe, or those stored in a folder.

    The first of `folders` that has them is used. Otherwise they are stored in the first one that can be written; if
    none can, they stay in memory and a warning says so. A damaged file is built again.

    Raises:
        DataError: `must_store`, and no folder can be written.
    """
    all_facts = {"version": VERSION, "name": name, **facts}
    file_name = f"{name}-{_key(all_facts)}.index"
    for folder in folders:
        if (tables := read_tables(folder / file_name, all_facts)) is not None:
            return tables
    built: Tables | None = None
    refusals: list[str] = []
    for folder in folders:
        path = folder / file_name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _lock(path):
                tables = read_tables(path, all_facts)
                if tables is None:
                    built = make() if built is None else built
                    write_tables(path, all_facts, built)
                    tables = read_tables(path, all_facts)
                if tables is not None:
                    return tables
        except OSError as error:
            refusals.append(f"{folder}: cannot be written: {error.strerror or error}")
            if not must_store:
                log.warning("%s", refusals[-1])
    if must_store:
        raise DataError(f"{'; '.join(refusals)}; free space, or give --index-cache a folder that can be written")
    log.warning("the %s index is kept in memory; set data.index_cache to a folder where it can be stored", name)
    return make() if built is None else built


def write_tables(path: Path, facts: Mapping[str, Any], tables: Mapping[str, np.ndarray]) -> None:
    """Writes the file `path` atomically: readers see none, the old one or the new one, even after a power loss.

    Raises:
        OSError: the disk is full or refuses; nothing is left behind.
    """
    arrays: list[tuple[str, str, list[int], int]] = []
    place = 0
    for name, array in tables.items():
        place = -(-place // _ALIGNMENT) * _ALIGNMENT
        arrays.append((name, array.dtype.newbyteorder("<").str, list(array.shape), place))
        place += array.nbytes
    header = json.dumps({"facts": facts, "arrays": arrays}).encode()
    header += b" " * (-(_FIXED_BYTES + len(header)) % _ALIGNMENT)
    blocks: list[bytes | memoryview] = [header]
    place = 0
    for array, (_, _, _, first) in zip(tables.values(), arrays, strict=True):
        blocks += [bytes(first - place), np.ascontiguousarray(array).reshape(-1).view(np.uint8).data]
        place = first + array.nbytes
    digest = xxhash.xxh64()
    for block in blocks:
        digest.update(block)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(_MAGIC + struct.pack("<QQ", len(header), digest.intdigest()))
            for block in blocks:
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        durable.follow_umask(Path(temporary))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    durable.sync_folder(path.parent)


def read_tables(path: Path, facts: Mapping[str, Any]) -> Tables | None:
    """The tables in `path`, mapped, if the file is intact and was built from `facts`; else None."""
    try:
        return _parse(_map(path), facts)
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("%s: cannot be read (%s); it is built again", path, error.strerror or error)
        return None
    except _DAMAGE as error:
        log.warning("%s: is damaged (%s); it is built again", path, error)
        return None


def find_damage(path: Path) -> str | None:
    """What is wrong with the file `path`, whatever it was built from; None if it is intact."""
    try:
        _parse(_map(path), None)
    except _DAMAGE as error:
        return str(error)
    return None


def _map(path: Path) -> memoryview:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < _FIXED_BYTES:
            raise ValueError("it is too short")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _parse(mapped: memoryview, facts: Mapping[str, Any] | None) -> Tables:
    header_bytes, expected = struct.unpack_from("<QQ", mapped, len(_MAGIC))
    if mapped[: len(_MAGIC)] != _MAGIC:
        raise ValueError("it does not begin with its magic")
    digest = xxhash.xxh64()
    for first in range(_FIXED_BYTES, len(mapped), _HASHED_AT_ONCE):
        digest.update(mapped[first : first + _HASHED_AT_ONCE])
    if digest.intdigest() != expected:
        raise ValueError(f"expected xxh64 {expected:016x}, found {digest.hexdigest()}")
    header = json.loads(bytes(mapped[_FIXED_BYTES : _FIXED_BYTES + header_bytes]))
    if facts is not None and header["facts"] != facts:
        raise ValueError("it was made of something else")
    tables, end = {}, _FIXED_BYTES + header_bytes
    for name, dtype, shape, first in header["arrays"]:
        count, offset = int(np.prod(shape, dtype=np.int64)), _FIXED_BYTES + header_bytes + first
        array = np.frombuffer(mapped, dtype, count, offset) if count else np.empty(0, dtype)
        tables[name] = array.reshape(shape)
        end = offset + array.nbytes
    # The hash does not cover the size of the header: a wrong one would move every array.
    if end != len(mapped):
        raise ValueError(f"expected {end} bytes, found {len(mapped)}")
    return tables


def _key(facts: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Locks PATH.lock against other processes, if the file system has locks."""
    with path.with_name(f".{path.name}.lock").open("a") as file:
        _wait_for(file.fileno(), path)
        yield


def _wait_for(descriptor: int, path: Path) -> None:
    start = last = time.monotonic()
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            now = time.monotonic()
            if now - start > _PATIENCE_SECONDS:
                log.warning("%s: another process has been building it for %.0f s; building it too", path, now - start)
                return
            if now - last > 30:
                last = now
                log.info("%s: another process is building it; waiting for %.0f s", path, now - start)
            time.sleep(0.02)
        except OSError:
            return  # no locks here: every process builds the same table
