"""The types that readers exchange: a source, a chunk of it, the documents of a chunk, and what is wrong with some."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from data_tools.readers.options import Compression, Kind
from pretrain.errors import DataError

_EXCERPT_CHARACTERS = 80


@dataclass(frozen=True)
class Source:
    """One file of a corpus (or one name of the Hugging Face hub, or standard input, whose path is `-`).

    `num_bytes` on disk, 0 where it is not known.
    """

    path: str
    kind: Kind
    compression: Compression = ""
    num_bytes: int = 0
    mtime_ns: int = 0

    @property
    def identity(self) -> tuple[str, int, int]:
        """What a later run compares to know that the source is the same: path, size, time of change."""
        return self.path, self.num_bytes, self.mtime_ns


@dataclass(frozen=True)
class Reject:
    """A document that is left out, or the lost part of a file, with the place and the reason.

    `line` counts from 1 (in tables, rows; None where it is not known), `byte` from 0 in the decompressed file. `reason`
    is one word to count by; `message` says it to people, with the remedy.
    """

    path: str
    line: int | None
    byte: int | None
    reason: str
    excerpt: str
    message: str = ""
    is_row: bool = False

    def error(self) -> DataError:
        """The same as an error that stops a run: file, place, what, remedy."""
        place = "" if self.line is None else f": row {self.line}" if self.is_row else f":{self.line}"
        return DataError(f"{self.path}{place}: {self.message}")


@dataclass(frozen=True)
class FileRange:
    """Bytes [start, end) of a plain file of `file_bytes`: the documents that begin there, for the worker to read."""

    start: int
    end: int
    file_bytes: int


@dataclass(frozen=True)
class Block:
    """Whole documents as bytes that were read already; `first_line` counts from 1, `first_byte` from 0.

    `column` and `num_columns` of csv and tsv: where the text stands in a record, from 0, and the length of records.
    """

    data: bytes
    first_line: int
    first_byte: int
    column: int = 0
    num_columns: int = 0


@dataclass(frozen=True)
class RowRange:
    """`num_rows` rows from `first_row` on of a row group (parquet) or record batch (arrow), for the worker to read.

    Those of arrow may go on in the batches after. `file_row`: rows of the file before them.
    """

    group: int
    first_row: int
    num_rows: int
    file_row: int


@dataclass(frozen=True)
class Values:
    """Values of the text column that were read already; `file_row`: rows before them."""

    values: tuple[Any, ...]
    file_row: int


Place = FileRange | Block | RowRange | Values


@dataclass(frozen=True)
class Chunk:
    """Whole documents of one source: where they stand, or their bytes; picklable.

    `source` is the number of the source, `number` that of the chunk in it, both from 0. `progress`: bytes of the source
    on disk, up to the end of this chunk. `faults`: what the cutter had to leave out, for `parse_chunk` to report.
    """

    source: int
    number: int
    path: str
    kind: Kind
    place: Place
    progress: int
    faults: tuple[Reject, ...] = ()

    @property
    def held_bytes(self) -> int:
        """Bytes of text that the chunk carries itself, and that memory is needed for while it waits."""
        if isinstance(self.place, Block):
            return len(self.place.data)
        if isinstance(self.place, Values):
            return sum(len(value) for value in self.place.values if isinstance(value, str))
        return 0


@dataclass
class Piece:
    """A chunk without its numbers. `start` and `end`: bytes of the source on disk before it, and up to its end."""

    place: Place
    start: int
    end: int
    faults: list[Reject] = field(default_factory=list)


@dataclass(frozen=True)
class LineSpan:
    """Bytes [first_byte, end_byte) of a plain file and the number of lines in them; see `LineNumbers`."""

    path: str
    first_byte: int
    end_byte: int
    num_lines: int


@dataclass
class ParsedChunk:
    """The texts of a chunk in order, and what was left out.

    `text_bytes`: decompressed bytes that the chunk stands for (of tables, of their texts, in UTF-8). `replaced`: texts
    that are kept with U+FFFD for bytes that were not UTF-8. `lines`: set where the lines of `rejects` count from the
    first line of the chunk, because the worker knows no other; `LineNumbers` makes them lines of the file.
    """

    texts: list[str] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    text_bytes: int = 0
    replaced: int = 0
    lines: LineSpan | None = None


def excerpt(data: bytes | str) -> str:
    """The beginning of a faulty document, to recognise it by."""
    if isinstance(data, bytes):
        data = data[: 4 * _EXCERPT_CHARACTERS].decode("utf-8", "backslashreplace")
    return data[:_EXCERPT_CHARACTERS]
