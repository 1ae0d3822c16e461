"""Reads texts from Arrow IPC files and streams, as in saved Hugging Face datasets; mapped into memory, not copied.

The parent reads only the sizes of record batches. A worker advances to the batches of its chunk and keeps its position
for the next chunk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from data_tools.readers.chunks import Piece, RowRange, Source
from data_tools.readers.compression import DamagedError
from data_tools.readers.faults import Faults
from data_tools.readers.options import ReadOptions
from data_tools.readers.tables import (
    arrow_errors_named,
    damaged_rows,
    find_column,
    text_column,
    texts_of_column,
    value_bytes,
)
from pretrain.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

_MAGIC = b"ARROW1"
_END_MARK = b"\xff\xff\xff\xff\0\0\0\0"


def cut_arrow(source: Source, options: ReadOptions, faults: Faults) -> Iterator[Piece]:
    """Chunks of rows; small record batches are joined, large ones split.

    Raises:
        DamagedError: the file is truncated, damaged, or not an arrow file.
        DataError: the column is missing or does not hold strings; the file cannot be read.
    """
    with arrow_errors_named(source.path):
        batches = _Batches(source.path)
        names = find_column(source.path, batches.schema, options.json_key)
        place, size, start, file_row = RowRange(0, 0, 0, 0), 0, 0, 0
        for index, batch in enumerate(batches):
            num_bytes = batch.column(batch.schema.get_field_index(names[0])).nbytes
            parts = max(min(-(-num_bytes // options.chunk_bytes), batch.num_rows), 1)
            step = max(-(-batch.num_rows // parts), 1)
            for first in range(0, batch.num_rows, step):
                count = min(step, batch.num_rows - first)
                if not place.num_rows:
                    place = RowRange(index, first, 0, file_row)
                place = RowRange(place.group, place.first_row, place.num_rows + count, place.file_row)
                size, file_row = size + num_bytes * count // batch.num_rows, file_row + count
                if size >= options.chunk_bytes:
                    end = min(batches.progress, source.num_bytes)
                    yield Piece(place, start, end)
                    place, size, start = RowRange(0, 0, 0, 0), 0, end
        if place.num_rows:
            yield Piece(place, start, source.num_bytes)
        batches.require_end()


def check_arrow(path: str, key: str) -> None:
    """Raises as `cut_arrow`, but reads only the schema."""
    with arrow_errors_named(path):
        find_column(path, _Batches(path).schema, key)


def parse_arrow(path: str, place: RowRange, options: ReadOptions, faults: Faults) -> tuple[list[str], int]:
    """The texts of rows, and their bytes. Raises as `cut_arrow` and `Faults`; with "skip", damage is a fault."""
    texts: list[str] = []
    num_bytes, row, end = 0, place.file_row, place.file_row + place.num_rows
    try:
        with arrow_errors_named(path):
            batches = _batches_at(path, place.group)
            names = find_column(path, batches.schema, options.json_key)
            first = place.first_row
            while row < end:
                batch = batches.current.slice(first, end - row)
                column = text_column(batch, names)
                num_bytes += value_bytes(column)
                texts += texts_of_column(path, column, row, options.max_document_bytes, faults)
                row, first = row + len(column), 0
                if row < end:
                    batches.advance()
    except DataError as error:
        _forget()
        if faults.stops or not isinstance(error, DamagedError):
            raise
        faults.add(damaged_rows(path, error, row, end))
    return texts, num_bytes


class _Batches:
    """The record batches of a file or stream, in order; one of them is current."""

    def __init__(self, path: str) -> None:
        import pyarrow as pa

        self._path = path
        self._mapped = pa.memory_map(path)
        self.is_file = self._mapped.read(len(_MAGIC)) == _MAGIC
        self._mapped.seek(0)
        self._reader: Any = (pa.ipc.open_file if self.is_file else pa.ipc.open_stream)(self._mapped)
        self.schema: pa.Schema = self._reader.schema
        self._failure: Exception | None = None
        self.index = -1
        self.current: pa.RecordBatch = None

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        """All intact batches; `require_end` raises the error that ended them."""
        import pyarrow as pa

        try:
            while self._step():
                yield self.current
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            self._failure = error

    def advance(self) -> None:
        """Moves to the next batch. Raises EOFError: there is none."""
        if not self._step():
            raise EOFError("it holds fewer rows than it did")

    @property
    def progress(self) -> int:
        """Bytes of the file up to the end of the current batch."""
        size = self._mapped.size()
        return size * (self.index + 1) // self._reader.num_record_batches if self.is_file else self._mapped.tell()

    def require_end(self) -> None:
        """Raises the error that ended the batches early; DamagedError: a stream does not end where its file does."""
        if self._failure is not None:
            raise self._failure
        if self.is_file:
            return
        end, size = self._mapped.tell(), self._mapped.size()
        self._mapped.seek(max(size - len(_END_MARK), 0))
        has_mark = self._mapped.read(len(_END_MARK)) == _END_MARK
        if end != size:
            words = f"damaged or truncated arrow stream (it ends at byte {end} of {size}); fetch it again"
        elif not has_mark:  # the format allows that, but a stream that is cut between two batches looks the same
            words = (
                "its arrow stream has no end mark: its writer was not closed, or it is truncated; write or fetch it "
            )
            words += "again, or keep what it holds with --on-error skip"
        if end != size or not has_mark:
            raise DamagedError(f"{self._path}: {words}", None)

    def _step(self) -> bool:
        if self.is_file:
            if self.index + 1 >= self._reader.num_record_batches:
                return False
            self.current = self._reader.get_batch(self.index + 1)
        else:
            try:
                self.current = self._reader.read_next_batch()
            except StopIteration:
                return False
        self.index += 1
        return True


# The batches that this process used last: its next chunk is often the following one.
_last: tuple[Any, _Batches] | None = None


def _batches_at(path: str, index: int) -> _Batches:
    global _last
    status = os.stat(path)
    identity = (path, status.st_size, status.st_mtime_ns)
    if _last is None or _last[0] != identity or _last[1].index > index:
        _last = (identity, _Batches(path))
    batches = _last[1]
    if batches.is_file and batches.index < index:
        batches.index = index - 1  # a file allows random access to its batches
    while batches.index < index:
        batches.advance()
    return batches


def _forget() -> None:
    global _last
    _last = None
