"""Plain files of lines or text: cut at byte offsets without reading them, read by the worker that parses them.

Chunk k of a file is the range [k x chunk_bytes, (k + 1) x chunk_bytes); its documents are those that begin in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from data_tools.readers.chunks import FileRange, Reject
from data_tools.readers.compression import open_input
from data_tools.readers.cutting import Rule, too_long
from pretrain.errors import DataError

_COUNT_BYTES = 1 << 22


def cut_file(num_bytes: int, chunk_bytes: int, first: int) -> Iterator[FileRange]:
    """The ranges of a file of `num_bytes`, starting with number `first`."""
    for start in range(first * chunk_bytes, num_bytes, chunk_bytes):
        yield FileRange(start, min(start + chunk_bytes, num_bytes), num_bytes)


def read_documents(path: str, place: FileRange, rule: Rule, limit: int) -> tuple[bytes, int, list[Reject]]:
    """The documents that begin in a range: their bytes, the offset of these, and the one that is too long, if any.

    Line numbers of the fault count from the first line of the bytes.

    Raises:
        DataError: the file cannot be read, or became shorter.
    """
    try:
        with open_input(path) as file:
            begin = rule.search(file, place.start, place.end - 1) if place.start else 0
            if begin < 0:
                return b"", place.end, []
            bound = min(place.file_bytes, place.end + limit + 1)
            end = rule.search(file, place.end, bound) if place.end < place.file_bytes else place.file_bytes
            if end < 0 and bound == place.file_bytes:
                end = bound
            if end >= 0:
                return _read(file, path, begin, end), begin, []
            # The last document that begins here has no end within the limit.
            data = _read(file, path, begin, place.end)
            last = rule.last(data)
            fault = too_long(path, 1 + data.count(b"\n", 0, last), begin + last, rule.what, limit, data[last:])
            return data[:last], begin, [fault]
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _read(file: BinaryIO, path: str, begin: int, end: int) -> bytes:
    file.seek(begin)
    data = file.read(end - begin)
    if len(data) < end - begin:
        raise DataError(
            f"{path}: became shorter while it was read: expected {end} bytes or more, found {begin + len(data)}; "
            "start again when the file is complete"
        )
    return data


def count_lines(path: str, begin: int, end: int) -> int:
    """The number of line ends in bytes [begin, end) of a plain file. Raises DataError: it cannot be read."""
    try:
        with open_input(path) as file:
            file.seek(begin)
            count = 0
            while begin < end and (data := file.read(min(_COUNT_BYTES, end - begin))):
                count += data.count(b"\n")
                begin += len(data)
            return count
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
