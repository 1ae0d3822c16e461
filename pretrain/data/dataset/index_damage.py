"""Where a PREFIX.idx that is not what was written differs from it, as far as its own redundancy tells.

Lengths and pointers say the same thing twice, the header's counts stand in the manifest as well, and document entries
never decrease; so a damaged entry is mostly found without a copy of the file. Every step looks at a bounded piece.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.data.dataset.dataset_format import CODE_OF_DTYPE, HEADER_BYTES, MAGIC, VERSION
from pretrain.data.dataset.manifest import Manifest

# Entries looked at in one go, and entries that are named before the rest is only counted.
_PIECE = 1 << 20
_MOST_NAMED = 20


@dataclass(frozen=True)
class IndexDamage:
    """One field or entry of PREFIX.idx: its name, its bytes, what it should be (in words) and what it is."""

    field: str
    first_byte: int
    end_byte: int
    expected: str
    found: str


def locate(path: Path, manifest: Manifest) -> list[IndexDamage]:
    """The damaged fields of `path`, a file of the size that the manifest says; never empty for one that differs.

    Where nothing contradicts itself, only the document entries can differ, and they are named as a whole.
    """
    found = _compare_header(path, manifest)
    table = _Tables(path, manifest)
    found += _compare_sequences(table)
    found += _compare_documents(table)
    if found:
        return found
    first, end = table.documents_first, manifest.idx_bytes
    return [IndexDamage("document entries", first, end, "those that were written", "others, in order")]


class _Tables:
    """The three arrays at the places where the manifest says that they are."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.itemsize = np.dtype(manifest.dtype).itemsize
        self.num_sequences, self.num_entries = manifest.sequences, manifest.documents + 1
        self.bin_bytes = manifest.bin_bytes
        self.pointers_first = HEADER_BYTES + 4 * self.num_sequences
        self.documents_first = self.pointers_first + 8 * self.num_sequences
        self.lengths = _map(path, "<i4", HEADER_BYTES, self.num_sequences)
        self.pointers = _map(path, "<i8", self.pointers_first, self.num_sequences)
        self.documents = _map(path, "<i8", self.documents_first, self.num_entries)

    def start(self, sequence: int) -> int:
        """Where a sequence begins in the .bin; of the number after the last one, the end of the .bin."""
        return int(self.pointers[sequence]) if sequence < self.num_sequences else self.bin_bytes

    def num_bytes(self, sequence: int) -> int:
        """Bytes of a sequence by its length."""
        return int(self.lengths[sequence]) * self.itemsize

    def length_damage(self, sequence: int, expected: str) -> IndexDamage:
        first = HEADER_BYTES + 4 * sequence
        return IndexDamage(f"sequence length {sequence}", first, first + 4, expected, str(self.lengths[sequence]))

    def pointer_damage(self, sequence: int, expected: int) -> IndexDamage:
        first = self.pointers_first + 8 * sequence
        found = str(self.pointers[sequence])
        return IndexDamage(f"sequence pointer {sequence}", first, first + 8, str(expected), found)

    def document_damage(self, entry: int, expected: str) -> IndexDamage:
        first = self.documents_first + 8 * entry
        return IndexDamage(f"document entry {entry}", first, first + 8, expected, str(self.documents[entry]))


def _compare_header(path: Path, manifest: Manifest) -> list[IndexDamage]:
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
    version, code, num_sequences, num_entries = struct.unpack("<QBQQ", header[9:])
    fields = (
        ("magic", 0, 9, MAGIC, header[:9]),
        ("version", 9, 17, VERSION, version),
        ("dtype code", 17, 18, CODE_OF_DTYPE[manifest.dtype], code),
        ("sequence count", 18, 26, manifest.sequences, num_sequences),
        ("document-entry count", 26, 34, manifest.documents + 1, num_entries),
    )
    return [
        IndexDamage(f"header field {name}", first, end, str(expected), str(found))
        for name, first, end, expected, found in fields
        if expected != found
    ]


def _compare_sequences(table: _Tables) -> list[IndexDamage]:
    """Every sequence must end where the next one begins; which of the entries is wrong, its neighbours tell."""
    if table.num_sequences == 0:
        return []
    bad = list(_bad_ends(table))
    found = []
    if table.start(0) != 0:
        found.append(table.pointer_damage(0, 0))
        bad = bad[1:] if table.num_bytes(0) == table.start(1) else bad
    is_used = False  # a wrong pointer makes two sequences wrong: the one that it begins, and the one before it
    for place, sequence in enumerate(bad[:_MOST_NAMED]):
        if is_used:
            is_used = False
            continue
        start, after = table.start(sequence), sequence + 1
        is_used = bad[place + 1 : place + 2] == [after]
        is_used = is_used and start + table.num_bytes(sequence) + table.num_bytes(after) == table.start(after + 1)
        if is_used:
            found.append(table.pointer_damage(after, start + table.num_bytes(sequence)))
        else:
            tokens, rest = divmod(table.start(after) - start, table.itemsize)
            expected = f"{tokens}" if tokens >= 0 and not rest else "an end at the next sequence's pointer"
            found.append(table.length_damage(sequence, expected))
    return found


def _bad_ends(table: _Tables) -> Iterator[int]:
    """Sequences that do not end where the next begins; the first ones only."""
    num_found = 0
    for first in range(0, table.num_sequences, _PIECE):
        last = min(first + _PIECE, table.num_sequences)
        ends = table.pointers[first:last] + table.lengths[first:last].astype(np.int64) * table.itemsize
        starts = table.pointers[first + 1 : last + 1]
        if last == table.num_sequences:
            starts = np.append(starts, table.bin_bytes)
        for place in np.flatnonzero(ends != starts):
            yield first + int(place)
            num_found += 1
            if num_found > _MOST_NAMED:
                return


def _compare_documents(table: _Tables) -> list[IndexDamage]:
    """Entries begin with 0, never decrease, and end with the sequence count."""
    found, previous, last = _odd_single_sequences(table), 0, table.num_entries - 1
    if found:
        return found
    ends = ((0, table.documents[0] != 0, "0"), (last, table.documents[last] != table.num_sequences, ""))
    wrong = [entry for entry, is_wrong, _ in ends if is_wrong]
    found = [
        table.document_damage(entry, words or f"{table.num_sequences}, the sequence count")
        for entry, is_wrong, words in ends
        if is_wrong
    ]
    for first in range(0, table.num_entries, _PIECE):
        entries = np.asarray(table.documents[first : first + _PIECE])
        before = np.concatenate(([previous], entries[:-1]))
        for place in np.flatnonzero((entries < before) | (entries > table.num_sequences))[:_MOST_NAMED]:
            entry = first + int(place)
            if entry not in wrong and entry - 1 not in wrong:
                found.append(_wrong_entry(table, entry))
        previous = int(entries[-1])
    return list({damage.field: damage for damage in found}.values())[:_MOST_NAMED]


def _wrong_entry(table: _Tables, entry: int) -> IndexDamage:
    """An entry below the one before it: either may be wrong, unless its other neighbour speaks against that."""
    count, value, before = table.num_sequences, int(table.documents[entry]), int(table.documents[entry - 1])
    earlier = int(table.documents[entry - 2]) if entry >= 2 else 0
    after = int(table.documents[entry + 1]) if entry + 1 < table.num_entries else count
    if value > count:
        return table.document_damage(entry, f"{before} to {after if before <= after <= count else count}")
    before_may_be_wrong, may_be_wrong = earlier <= value, before <= after and before <= count
    if not may_be_wrong:
        return table.document_damage(entry - 1, f"{earlier} to {value}" if before_may_be_wrong else "entries in order")
    damage = table.document_damage(entry, f"{before} to {after}")
    if not before_may_be_wrong:
        return damage
    field, found = f"document entry {entry - 1} or {entry}", f"{before} and {value}"
    return IndexDamage(field, damage.first_byte - 8, damage.end_byte, "entries that do not decrease", found)


def _odd_single_sequences(table: _Tables) -> list[IndexDamage]:
    """Where there are as many documents as sequences and all entries but one are their own number, that one is odd."""
    if table.num_entries != table.num_sequences + 1:
        return []
    odd: list[int] = []
    for first in range(0, table.num_entries, _PIECE):
        entries = table.documents[first : first + _PIECE]
        odd += (first + np.flatnonzero(entries != np.arange(first, first + len(entries)))).tolist()
        if len(odd) > 1:
            return []
    return [table.document_damage(entry, str(entry)) for entry in odd]


def _map(path: Path, dtype: str, offset: int, count: int) -> np.ndarray:
    if count == 0:  # an empty range cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,)).view(np.ndarray)
