"""Looks at the beginning of every file, before any work: whether it holds what its name says."""

from __future__ import annotations

from data_tools.readers.arrow_files import check_arrow
from data_tools.readers.chunks import Source
from data_tools.readers.compression import DamagedError, open_input, read_blocks
from data_tools.readers.formats import HEAD_BYTES, refuse_other_format
from data_tools.readers.headers import check_header
from data_tools.readers.layouts import LOOK_BYTES, refuse_layout
from data_tools.readers.options import ReadOptions
from data_tools.readers.parquet_files import check_parquet
from pretrain.errors import DataError


def check_source(source: Source, options: ReadOptions) -> None:
    """Checks the first bytes of a file, its schema if it is a table, and its header if it is csv or tsv.

    Raises:
        DamagedError: a table is truncated or damaged.
        DataError: the file is of another format or layout, or has no such column; it cannot be read.
    """
    if source.path == "-" or source.kind == "hub":  # cannot be read twice
        return
    if source.kind in ("parquet", "arrow"):
        refuse_other_format(source.path, _read(source.path, HEAD_BYTES), source.kind, "")
        (check_parquet if source.kind == "parquet" else check_arrow)(source.path, options.json_key)
        return
    if source.compression == "bz2":  # its blocks are long: unpacking one of every file takes too much time
        refuse_other_format(source.path, _read(source.path, HEAD_BYTES), source.kind, source.compression)
        return
    if source.compression:
        try:
            content, _ = next(read_blocks(source.path, source.compression, LOOK_BYTES, 0, source.kind), (b"", 0))
        except DamagedError:
            return  # it is found again, and counted, when the file is read
    else:
        content = _read(source.path, LOOK_BYTES)
        refuse_other_format(source.path, content[:HEAD_BYTES], source.kind, "")
    refuse_layout(source, options, content)
    if source.kind in ("csv", "tsv"):
        check_header(source, options, content, is_whole=len(content) < LOOK_BYTES)


def _read(path: str, num_bytes: int) -> bytes:
    try:
        with open_input(path) as file:
            return file.read(num_bytes)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
