"""Reads texts from Parquet files. The parent reads only the footers; workers read rows of a row group, of one column.

A row group can only be decoded from its start, so it is cut into few parts, and a worker continues where it stopped if
its next part is of the same row group.

The metadata of single columns is not read: with a damaged footer, pyarrow kills the process when it is accessed.
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

_MAX_PARTS = 8
_MAX_PART_BYTES = 64 << 20
_MAX_ROWS = 1 << 17
_BATCH_BYTES = 4 << 20
_MAX_BATCH_ROWS = 1024
_READ_BYTES = 1 << 20
_RATIO_FREE_BYTES = 64 << 20


def cut_parquet(source: Source, options: ReadOptions, faults: Faults) -> Iterator[Piece]:
    """Chunks of rows of one row group each.

    Raises:
        DamagedError: the file is truncated, damaged, or not a Parquet file.
        DataError: the column is missing or does not hold strings; the file cannot be read.
    """
    with arrow_errors_named(source.path), _open(source.path) as file:
        metadata = file.metadata
        find_column(source.path, file.schema_arrow, options.json_key)
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        rows_in_groups = sum(group.num_rows for group in groups)
        if rows_in_groups != metadata.num_rows:
            words = f"{metadata.num_rows} rows, of which its row groups hold {rows_in_groups}"
            raise DamagedError(f"{source.path}: damaged parquet file (its footer says {words}); fetch it again", None)
        total = sum(group.total_byte_size for group in groups) or 1
        before = rows_before = 0
        for index, group in enumerate(groups):
            size, rows = group.total_byte_size, group.num_rows
            step = _rows_per_part(rows, size, options.chunk_bytes)
            for first in range(0, rows, step):
                count = min(step, rows - first)
                start, end = (
                    source.num_bytes * (before + size * row // rows) // total for row in (first, first + count)
                )
                yield Piece(RowRange(index, first, count, rows_before + first), start, end)
            before, rows_before = before + size, rows_before + rows


def check_parquet(path: str, key: str) -> None:
    """Raises as `cut_parquet`, but reads only the footer."""
    with arrow_errors_named(path), _open(path) as file:
        find_column(path, file.schema_arrow, key)


def parse_parquet(path: str, place: RowRange, options: ReadOptions, faults: Faults) -> tuple[list[str], int]:
    """The texts of rows, and their bytes. Raises as `cut_parquet` and `Faults`; with "skip", damage is a fault."""
    texts: list[str] = []
    num_bytes, row = 0, place.file_row
    try:
        with arrow_errors_named(path):
            reader = _reader_at(path, options.json_key, place)
            for column in reader.take(place.num_rows):
                num_bytes += value_bytes(column)
                if options.max_ratio and num_bytes > max(_RATIO_FREE_BYTES, options.max_ratio * reader.bytes_on_disk):
                    raise DamagedError(
                        f"{path}: row group {place.group} unfolds to more than {options.max_ratio} times the file; "
                        "raise --max-ratio if it is sound",
                        None,
                    )
                texts += texts_of_column(path, column, row, options.max_document_bytes, faults)
                row += len(column)
    except DataError as error:
        _forget_reader()
        if faults.stops or not isinstance(error, DamagedError):
            raise
        faults.add(damaged_rows(path, error, row, place.file_row + place.num_rows))
    return texts, num_bytes


class _GroupReader:
    """The text column of one row group, from its first row to its last."""

    def __init__(self, path: str, key: str, group: int) -> None:
        self._file = file = _open(path)
        self.names = find_column(path, file.schema_arrow, key)
        meta = file.metadata.row_group(group)
        self.bytes_on_disk = os.stat(path).st_size
        per_row = max(meta.total_byte_size // max(meta.num_rows, 1), 1)
        rows = min(max(_BATCH_BYTES // per_row, 1), _MAX_BATCH_ROWS)
        self._batches = file.iter_batches(rows, row_groups=[group], columns=[key], use_threads=False)
        self._rest: pa.Array | None = None
        self.row = 0

    def skip_to(self, row: int) -> None:
        """Skips the rows before `row`."""
        for _ in self.take(row - self.row):
            pass

    def take(self, num_rows: int) -> Iterator[pa.Array]:
        """The next rows. Raises EOFError: there are fewer."""
        while num_rows > 0:
            column = self._rest if self._rest is not None else self._next()
            part, self._rest = column.slice(0, num_rows), None
            if len(column) > num_rows:
                self._rest = column.slice(num_rows)
            num_rows -= len(part)
            self.row += len(part)
            yield part

    def _next(self) -> pa.Array:
        batch = next(self._batches, None)
        if batch is None:
            raise EOFError("a row group ends before its rows do")
        return text_column(batch, self.names)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


# The reader that this process used last: its next chunk is often the following one.
_last: tuple[Any, _GroupReader] | None = None


def _reader_at(path: str, key: str, place: RowRange) -> _GroupReader:
    global _last
    status = os.stat(path)
    identity = (path, key, place.group, status.st_size, status.st_mtime_ns)
    if _last is None or _last[0] != identity or _last[1].row > place.first_row:
        _forget_reader()
        _last = (identity, _GroupReader(path, key, place.group))
    reader = _last[1]
    reader.skip_to(place.first_row)
    return reader


def _forget_reader() -> None:
    global _last
    if _last is not None:
        _last[1].close()
    _last = None


def _rows_per_part(rows: int, num_bytes: int, chunk_bytes: int) -> int:
    parts = max(-(-num_bytes // _MAX_PART_BYTES), min(_MAX_PARTS, -(-num_bytes // chunk_bytes)), 1)
    return min(max(-(-rows // parts), 1), _MAX_ROWS)


def _open(path: str) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path, buffer_size=_READ_BYTES, pre_buffer=False)
