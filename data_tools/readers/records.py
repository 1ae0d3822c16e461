"""The records of csv and tsv text: fields, line ends, and what is left out around a stray quote."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator

from data_tools.readers.chunks import Block, Reject, excerpt
from data_tools.readers.faults import Faults
from data_tools.readers.options import ReadOptions
from data_tools.readers.streams import Blocks

# The largest C long on platforms where it has 32 bits. Fields are bounded by --max-document-bytes, not by csv.
_FIELD_LIMIT = 2**31 - 1
# A header, or first record, of more bytes than these is taken to end with a line feed.
_MAX_FIRST_BYTES = 1 << 20
_MARKS = re.compile(rb'["\r\n]')
_MEND = "mend it, or, if no field is quoted, read without quoting: --quoting none"


def dialect(kind: str, options: ReadOptions) -> tuple[str, bool]:
    """The delimiter, and whether quotes are special."""
    delimiter = options.delimiter or ("\t" if kind == "tsv" else ",")
    return delimiter, options.quoting == "rfc4180" or (options.quoting == "auto" and kind == "csv")


def csv_reader(lines: Iterator[str], delimiter: str, *, strict: bool) -> Iterator[list[str]]:
    """A reader of Python's csv, without its limit of 131,072 characters per field."""
    csv.field_size_limit(_FIELD_LIMIT)
    return csv.reader(lines, delimiter=delimiter, strict=strict)


def with_line_feeds(blocks: Blocks, *, is_quoted: bool) -> Blocks:
    """The blocks, with line feeds for carriage returns if the first line ends in a carriage return alone."""
    held: list[tuple[bytes, int]] = []
    first, is_mac = b"", None
    for block in blocks:
        held.append(block)
        first += block[0]
        is_mac = ends_in_cr(first, is_quoted=is_quoted)
        if is_mac is not None or len(first) > _MAX_FIRST_BYTES:
            break
    for data, progress in held:
        yield (data.replace(b"\r", b"\n") if is_mac else data), progress
    for data, progress in blocks:
        yield (data.replace(b"\r", b"\n") if is_mac else data), progress


def ends_in_cr(data: bytes, *, is_quoted: bool) -> bool | None:
    """Whether the first line of `data` outside quotes ends in a carriage return alone; None: it has no end yet."""
    is_inside = False
    for match in _MARKS.finditer(data):
        if match[0] == b'"':
            is_inside = is_quoted and not is_inside
        elif not is_inside:
            following = data[match.end() : match.end() + 1]
            if match[0] == b"\r" and following == b"\r":  # as a broken program writes \r\r\n
                continue
            return (match[0] == b"\r" and following != b"\n") if following or match[0] == b"\n" else None
    return None


def records(
    path: str, text: str, block: Block, form: tuple[str, bool], faults: Faults
) -> Iterator[tuple[int, list[str]]]:
    """The fields of each record in the `text` of a block, with the line on which it begins. Raises as `Faults`.

    After a record that is broken on a later line than its first, as by a stray quote, only the first line is left out,
    and reading goes on with the next: with several columns, lines that are no records are found by their fields.
    """
    delimiter, is_quoted = form
    if not is_quoted:
        for number, record in enumerate(text.split("\n"), start=block.first_line):
            if record.strip("\r"):
                yield number, record.removesuffix("\r").split(delimiter)
        return
    lines: list[str] = []
    reader, start = csv_reader(io.StringIO(text, newline="\n"), delimiter, strict=True), 0
    while True:
        first = start + reader.line_num  # type: ignore[attr-defined]
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lines = lines or io.StringIO(text, newline="\n").readlines()
            end = start + reader.line_num  # type: ignore[attr-defined]
            faults.add(_broken(path, error, lines, first, end, block))
            if end > first + 1 and block.num_columns > 1:
                start = first + 1
                reader = csv_reader(map(lines.__getitem__, range(start, len(lines))), delimiter, strict=True)
            continue
        if row:
            yield block.first_line + first, row


def _broken(path: str, error: csv.Error, lines: list[str], first: int, end: int, block: Block) -> Reject:
    """The fault of the record on lines [first, end) of a block."""
    line, last = block.first_line + first, block.first_line + end - 1
    if "unexpected end of data" in str(error):
        words = f"broken record: a quote that opens at line {line} is never closed"
    elif "new-line character" in str(error):
        words = f"broken record: a carriage return outside quotes at line {last}"
    elif end > first + 1:
        words = f"broken record: a quote that opens at line {line} is not closed before line {last} ({error})"
    else:
        words = f"broken record ({error})"
    mend = _MEND
    if '\\"' in lines[first]:
        mend = "quotes inside a field are written twice, not with a backslash: write the file again so"
    if end > first + 1 and block.num_columns == 1:
        num_bytes = sum(len(lines[number].encode("utf-8", "surrogateescape")) for number in range(first, end))
        words += f": lines {line} to {last} ({num_bytes:,} bytes) are lost"
    return Reject(path, line, None, "broken_record", excerpt(ascii_safe(lines[first])), f"{words}; {mend}")


def ascii_safe(line: str) -> str:
    """A line without its end, and with escapes for bytes that are not UTF-8."""
    return line.rstrip("\r\n").encode("utf-8", "backslashreplace").decode("utf-8")
