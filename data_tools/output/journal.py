"""PREFIX.journal: what a run has flushed to disk, so that the same command resumes there however the run ended.

The first line describes the run (options, inputs, tokenizer), each later one its progress. A line is 16 hexadecimal
digits, a space and JSON; the digits are the xxh64 of the previous line's digits and the JSON, so nothing after a torn,
changed or missing line is trusted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash

from pretrain import durable
from pretrain.data.dataset.dataset_writer import WriterState
from pretrain.data.dataset.manifest import Dropped

_DIGITS = 16


@dataclass(frozen=True)
class RunState:
    """The progress of a run: its first unfinished chunk, as (source, number), and the totals of all chunks before it.

    `reject_bytes` is the length of the spool of rejects. `is_complete`: no chunk is left. `published`: the hash of the
    finished dataset, known just before it is published.
    """

    next_chunk: tuple[int, int] = (0, 0)
    writer: WriterState = WriterState()
    dropped: dict[str, Dropped] = field(default_factory=dict)
    text_bytes: int = 0
    disk_bytes: int = 0
    rejects: int = 0
    replaced: int = 0
    reject_bytes: int = 0
    is_complete: bool = False
    published: str = ""


class Journal:
    """The lines of one journal; `header` and `states` are from trusted lines only."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path, self.header = path, header
        self._records: list[tuple[int, str, dict[str, Any]]] = []  # end of the line, its digits, its content
        self._num_chunks = 0

    @classmethod
    def load(cls, path: Path) -> Journal | None:
        """The journal in the file `path`; None if it is missing, or not even its first line can be trusted."""
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        lines = _trusted_lines(data)
        first = next(lines, None)
        if first is None:
            return None
        journal = cls(path, first[2])
        journal._records = [first, *lines]
        return journal

    @property
    def states(self) -> Iterator[RunState]:
        """Every state, the newest first."""
        for number in range(len(self._records) - 1, 0, -1):
            yield self._state(number)

    def go_back_to(self, state: RunState) -> None:
        """Removes the lines after that of `state`."""
        while len(self._records) > 1 and self._state(len(self._records) - 1) != state:
            self._records.pop()
        self._num_chunks = len(state.writer.bin_xxh64)
        with self.path.open("r+b") as file:
            file.truncate(self._records[-1][0])
            os.fsync(file.fileno())

    def append(self, state: RunState) -> None:
        """Adds a line and flushes it to disk. Raises OSError: it cannot be written; earlier lines stay valid."""
        contents = [self._pack(state)] if self._records else [self.header, self._pack(state)]
        end, digits = (self._records[-1][0], self._records[-1][1]) if self._records else (0, "")
        records, is_new = [], not self._records
        with self.path.open("wb" if is_new else "r+b") as file:
            file.truncate(end)  # removes a line torn by a full disk
            file.seek(end)
            for content in contents:
                text = json.dumps(content).encode()
                digits = _digits(digits, text)
                file.write(b"%s %s\n" % (digits.encode(), text))
                end += len(digits) + len(text) + 2
                records.append((end, digits, content))
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            durable.sync_folder(self.path.parent)
        self._records += records
        self._num_chunks = len(state.writer.bin_xxh64)

    def remove(self) -> None:
        """Removes the journal: the dataset is complete."""
        self.path.unlink(missing_ok=True)

    def _pack(self, state: RunState) -> dict[str, Any]:
        """`state` with only the chunk hashes that the previous line lacks or has incomplete: there may be a million."""
        content = asdict(state)
        first = max(self._num_chunks - 1, 0)
        content["writer"]["bin_xxh64"] = content["writer"]["bin_xxh64"][first:]
        return {**content, "first_chunk": first}

    def _state(self, number: int) -> RunState:
        content = dict(self._records[number][2])
        digests: list[str] = []
        for _, _, record in self._records[1 : number + 1]:
            digests[record["first_chunk"] :] = record["writer"]["bin_xxh64"]
        del content["first_chunk"]
        writer = WriterState(**{**content["writer"], "bin_xxh64": tuple(digests)})
        dropped = {reason: Dropped(**item) for reason, item in content["dropped"].items()}
        content |= {"writer": writer, "dropped": dropped, "next_chunk": tuple(content["next_chunk"])}
        return replace(RunState(), **content)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The differences between the headers of two runs, as `key: old, now new`."""
    changes = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changes += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            changes.append(f"{prefix}{key}: {before!r}, now {after!r}")
    return changes


def _trusted_lines(data: bytes) -> Iterator[tuple[int, str, dict[str, Any]]]:
    end, digits = 0, ""
    while (newline := data.find(b"\n", end)) >= 0:
        line = data[end:newline]
        text = line[_DIGITS + 1 :]
        if line[: _DIGITS + 1] != f"{_digits(digits, text)} ".encode():
            return
        end, digits = newline + 1, line[:_DIGITS].decode()
        yield end, digits, json.loads(text)


def _digits(before: str, text: bytes) -> str:
    return xxhash.xxh64(before.encode() + text).hexdigest()
