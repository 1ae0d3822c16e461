"""Damage to datasets on disk, and the plain definition of what a reader may make of it.

`attack` applies damage to a sound dataset and holds the reader to this: it opens what the format allows, giving exactly
the tokens that are there, and refuses the rest with a DataError. Nothing here is an `assert`, so that

    python -O tests/data/hostile_files.py FOLDER CASES SEED

does the same without assertions and in an address space with little room.
"""

from __future__ import annotations

import random
import resource
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from pretrain.data.dataset.indexed_dataset import IndexedDataset
from pretrain.errors import DataError

WIDTHS = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
HEADER = struct.Struct("<9sQBQQ")
# A dataset by its documents of sequences of token ids, and its dtype code.
CORPORA: list[tuple[list[list[list[int]]], int]] = [
    ([[[5, 6, 7], [8]], [], [[]], [[9, 10]], [[11], [], [12]]], 8),
    ([[[i % 99] * (i % 7)] for i in range(40)], 4),
    ([[[1, 2], [3, 4]]], 1),
    ([[[2, 2]] * 3, [[7] * 9]], 5),
    ([], 8),
]
FIELDS = {"magic": (0, 9), "version": (9, 8), "dtype code": (17, 1), "sequences": (18, 8), "entries": (26, 8)}
KINDS = [*FIELDS, "length", "pointer", "index", "flip", "splice", "move", "idx size", "bin size"]
VALUES = [
    0,
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    9,
    255,
    -1,
    -2,
    *(s * 2**e + d for s in (1, -1) for e in (31, 32, 60, 63) for d in (-1, 0, 1)),
]


@dataclass(frozen=True)
class Mutation:
    """One damage: what kind, where (taken modulo what there is), and a number that it uses."""

    kind: str
    place: int
    value: int


class Deviation(Exception):
    """The reader did something else than the format says."""


@cache
def sound_files(number: int) -> tuple[bytes, bytes]:
    """PREFIX.idx and PREFIX.bin of `CORPORA[number]`, put together from the definition."""
    documents, code = CORPORA[number]
    sequences = [sequence for document in documents for sequence in document]
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    data = np.array([token for sequence in sequences for token in sequence], WIDTHS[code])
    pointers = np.cumsum([0, *lengths])[: len(lengths)] * data.itemsize
    indices = np.cumsum([0, *map(len, documents)])
    header = HEADER.pack(b"MMIDIDX\0\0", 1, code, len(lengths), len(indices))
    idx = header + lengths.tobytes() + pointers.astype("<i8").tobytes() + indices.astype("<i8").tobytes()
    return idx, data.tobytes()


def damage(idx: bytes, data: bytes, mutations: Sequence[Mutation]) -> tuple[bytes, bytes]:
    """Both files with `mutations` applied one after the other."""
    count = HEADER.unpack(idx[: HEADER.size])[3]
    tables = {"length": (34, 4), "pointer": (34 + 4 * count, 8), "index": (34 + 12 * count, 8)}
    content = bytearray(idx)
    for mutation in mutations:
        kind, place, value = mutation.kind, mutation.place, mutation.value
        if kind in FIELDS:
            offset, width = FIELDS[kind]
            content[offset : offset + width] = number(value, width)
        elif kind in tables:
            offset, width = tables[kind]
            offset += place % (count + 1) * width
            old = int.from_bytes(content[offset : offset + width], "little")
            content[offset : offset + width] = number(old + value if place % 2 else value, width)
        elif kind == "flip" and content:
            content[place % len(content)] ^= 1 << value % 8
        elif kind == "splice" and content:
            content[place % len(content) : place % len(content) + 8] = number(value, 8)
        elif kind == "move":
            _move_token(content, place, count)
        elif kind == "idx size":
            content = bytearray(_resized(bytes(content), place, value))
        elif kind == "bin size":
            data = _resized(data, place, value)
    return bytes(content), data


def _move_token(content: bytearray, place: int, count: int) -> None:
    """Moves one token over a border of sequences: another dataset, and a sound one."""
    if count < 2 or len(content) < 34 + 12 * count:
        return
    first = place % (count - 1)
    lengths = np.frombuffer(content, "<i4", count, 34)
    if lengths[first] <= 0 or lengths[first + 1] == 2**31 - 1 or content[17] not in WIDTHS:
        return
    lengths[first] -= 1
    lengths[first + 1] += 1
    pointers = np.frombuffer(content, "<i8", count, 34 + 4 * count)
    pointers[first + 1] -= np.dtype(WIDTHS[content[17]]).itemsize


def _resized(content: bytes, place: int, value: int) -> bytes:
    return content[: place % (len(content) + 1)] if place % 3 else content + bytes([value % 256]) * (place % 50 + 1)


def number(value: int, width: int) -> bytes:
    """The low `width` bytes of `value`."""
    return (value % 2 ** (8 * width)).to_bytes(width, "little")


def plain_read(idx: bytes, data: bytes) -> list[list[int]] | None:
    """The tokens of every document, or None for files that the format does not allow."""
    if len(idx) < HEADER.size:
        return None
    magic, version, code, count, entries = HEADER.unpack(idx[: HEADER.size])
    if magic != b"MMIDIDX\0\0" or version != 1 or code not in WIDTHS or entries < 1:
        return None
    if len(idx) != HEADER.size + 12 * count + 8 * entries:
        return None
    lengths = struct.unpack_from(f"<{count}i", idx, 34)
    pointers = struct.unpack_from(f"<{count}q", idx, 34 + 4 * count)
    indices = struct.unpack_from(f"<{entries}q", idx, 34 + 12 * count)
    tokens, end = np.frombuffer(data[: len(data) // int(WIDTHS[code][-1]) * int(WIDTHS[code][-1])], WIDTHS[code]), 0
    starts = []
    for length, pointer in zip(lengths, pointers, strict=True):
        if length < 0 or pointer != end:
            return None
        starts.append(end // tokens.itemsize)
        end += length * tokens.itemsize
    if end != len(data) or indices[0] != 0 or indices[-1] != count or list(indices) != sorted(indices):
        return None
    starts.append(end // tokens.itemsize)
    return [tokens[starts[a] : starts[b]].tolist() for a, b in zip(indices, indices[1:], strict=False)]


def attack(folder: Path, corpus: int, mutations: Sequence[Mutation]) -> bool:
    """Whether the reader opened `CORPORA[corpus]` after `mutations`; raises Deviation if the format says otherwise."""
    idx, data = damage(*sound_files(corpus), mutations)
    for suffix, content in ((".idx", idx), (".bin", data)):
        path = folder / f"x{suffix}"
        path.unlink(missing_ok=True)  # another file: an array of the last case may still be mapped
        path.write_bytes(content)
    expected = plain_read(idx, data)
    start = time.process_time()
    try:
        dataset = IndexedDataset(folder / "x")
    except DataError as error:
        if expected is not None:
            raise Deviation(f"a sound dataset was refused: {error}") from error
        if f"{folder / 'x'}." not in str(error):
            raise Deviation(f"the file is not named: {error}") from error
        return False
    finally:
        if (seconds := time.process_time() - start) > 1:
            raise Deviation(f"took {seconds:.1f} s")
    found = [dataset.document(i).tolist() for i in range(dataset.num_documents)]
    if expected is None or found != expected:
        raise Deviation(f"expected {expected}, found {found}")
    if dataset.tokens.tolist() != [token for document in found for token in document]:
        raise Deviation("tokens and documents differ")
    return True


def random_mutations(random_: random.Random) -> list[Mutation]:
    """One to three of them."""
    count = random_.randint(1, 3)
    return [Mutation(random_.choice(KINDS), random_.randrange(1000), random_.choice(VALUES)) for _ in range(count)]


def _main(folder: Path, num_cases: int, seed: int) -> None:
    attack(folder, 0, [])  # what is imported at the first use is no growth
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), used + (64 << 20)))
    random_, num_opened = random.Random(seed), 0
    for _ in range(num_cases):
        num_opened += attack(folder, random_.randrange(len(CORPORA)), random_mutations(random_))
    print(f"{num_cases} cases, {num_opened} opened, assertions {'on' if __debug__ else 'off'}")


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
