"""The types that readers exchange: sources, their chunks, the documents of a chunk, and rejects."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from data_tools.readers.options import Compression, Kind
from pretrain.errors import DataError

_EXCERPT_CHARACTERS = 80


@dataclass(frozen=True)
class Source:
    """One file of a corpus (or one dataset name of the Hugging Face hub, or standard input, whose path is `-`).

    `num_bytes` on disk, 0 if unknown. `name`: that of the file inside the folder or pattern that was given, by which it
    is recognised where the corpus lies at another place.
    """

    path: str
    kind: Kind
    compression: Compression = ""
    num_bytes: int = 0
    mtime_ns: int = 0
    name: str = field(default="", compare=False)

    @property
    def identity(self) -> tuple[str, int, int]:
        """What a later run compares to detect a changed source: path, size, modification time."""
        return self.path, self.num_bytes, self.mtime_ns


@dataclass(frozen=True)
class Reject:
    """A document that is left out, or the lost part of a file, with its location and the reason.

    `line` counts from 1 (in tables, rows; None if unknown), `byte` from 0 in the decompressed file. `reason` is one
    word for counting; `message` is the explanation, with the remedy.
    """

    path: str
    line: int | None
    byte: int | None
    reason: str
    excerpt: str
    message: str = ""
    is_row: bool = False

    def error(self) -> DataError:
        """The same as an error that stops a run: file, location, fault, remedy."""
        place = "" if self.line is None else f": row {self.line}" if self.is_row else f":{self.line}"
        return DataError(f"{self.path}{place}: {self.message}")


@dataclass(frozen=True)
class FileRange:
    """Bytes [start, end) of a plain file of `file_bytes`; the worker reads the documents that begin there."""

    start: int
    end: int
    file_bytes: int


@dataclass(frozen=True)
class Block:
    """Whole documents as bytes, read already; `first_line` counts from 1, `first_byte` from 0.

    `column` and `num_columns`, for csv and tsv: the index of the text column, from 0, and the fields per record.
    """

    data: bytes
    first_line: int
    first_byte: int
    column: int = 0
    num_columns: int = 0


@dataclass(frozen=True)
class RowRange:
    """`num_rows` rows, from `first_row`, of a row group (parquet) or record batch (arrow), read by the worker.

    With arrow they may continue in the following batches. `file_row`: rows of the file before them.
    """

    group: int
    first_row: int
    num_rows: int
    file_row: int


@dataclass(frozen=True)
class Values:
    """Values of the text column, read already; `file_row`: rows before them."""

    values: tuple[Any, ...]
    file_row: int


Place = FileRange | Block | RowRange | Values


@dataclass(frozen=True)
class Chunk:
    """Whole documents of one source: their location, or their bytes; picklable.

    `source` is the number of the source, `number` that of the chunk in it, both from 0. `progress`: bytes of the source
    on disk, up to the end of this chunk. `faults`: what cutting had to leave out, reported by `parse_chunk`.
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
        """Bytes of text in the chunk itself, which take memory while it is queued."""
        if isinstance(self.place, Block):
            return len(self.place.data)
        if isinstance(self.place, Values):
            return sum(len(value) for value in self.place.values if isinstance(value, str))
        return 0

    @property
    def text_bytes(self) -> int | None:
        """Bytes of text in the chunk, wherever they are; None if only reading tells."""
        if isinstance(self.place, FileRange):
            return self.place.end - self.place.start
        return None if isinstance(self.place, RowRange) else self.held_bytes


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

    `text_bytes`: decompressed bytes of the chunk (for tables, of their texts in UTF-8). `replaced`: texts kept with
    U+FFFD for bytes that were not UTF-8. `lines`: set if the lines of `rejects` count from the first line of the chunk,
    because the worker does not know its line number; `LineNumbers` turns them into lines of the file.
    """

    texts: list[str] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    text_bytes: int = 0
    replaced: int = 0
    lines: LineSpan | None = None


def excerpt(data: bytes | str) -> str:
    """The beginning of a faulty document, to identify it."""
    if isinstance(data, bytes):
        data = data[: 4 * _EXCERPT_CHARACTERS].decode("utf-8", "backslashreplace")
    return data[:_EXCERPT_CHARACTERS]
