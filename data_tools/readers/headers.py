"""The header of csv and tsv files, or their first record: which column holds the text."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from data_tools.readers.chunks import Source
from data_tools.readers.cutting import BOM
from data_tools.readers.options import ReadOptions
from data_tools.readers.records import csv_reader, dialect, ends_in_cr
from pretrain.errors import DataError

_DELIMITERS = {";": "';'", "\t": "'\\t'", "|": "'|'", ",": "','"}


@dataclass(frozen=True)
class Header:
    """The text column from 0, the number of columns, and the lines and bytes before the first record."""

    column: int
    num_columns: int
    num_lines: int
    num_bytes: int


def find_header(source: Source, options: ReadOptions, data: bytes, *, is_whole: bool = True) -> Header | None:
    """The header in the first bytes of a file; None: only blank lines, or, if not `is_whole`, an incomplete one.

    Raises:
        DataError: there is no such column, or several.
    """
    text = data.decode("utf-8", "replace")
    delimiter, is_quoted = dialect(source.kind, options)
    lines = io.StringIO(text, newline="\n")
    names: list[str] = []
    num_lines = before = 0
    if is_quoted:
        reader = csv_reader(lines, delimiter, strict=False)
        try:
            while not names and (row := next(reader, None)) is not None:
                names, before, num_lines = row, num_lines, reader.line_num  # type: ignore[attr-defined]
        except csv.Error as error:
            raise DataError(f"{source.path}:{num_lines + 1}: broken header ({error}); mend it") from None
    else:
        while not names and (line := lines.readline()):
            before, num_lines = num_lines, num_lines + 1
            names = line.rstrip("\r\n").split(delimiter) if line.strip("\r\n") else []
    end = _after_lines(data, num_lines)
    if not names or (not is_whole and end >= len(data)):
        return None
    if not options.has_header:
        column, begin = int(options.json_key) - 1, _after_lines(data, before)
        if column >= len(names):
            raise DataError(
                f"{source.path}: no column {options.json_key}: its first record has {len(names)}; "
                f"choose another with --json-key, or see --delimiter{_other_delimiter(names)}"
            )
        return Header(column, len(names), before, begin)
    if options.json_key not in names:
        raise no_column(source.path, options.json_key, names, _other_delimiter(names))
    if names.count(options.json_key) > 1:
        raise several_columns(source.path, options.json_key, names)
    return Header(names.index(options.json_key), len(names), num_lines, end)


def check_header(source: Source, options: ReadOptions, content: bytes, *, is_whole: bool) -> None:
    """Raises as `find_header` for the first bytes of a file, if they hold the whole header."""
    content = content.removeprefix(BOM)
    if ends_in_cr(content, is_quoted=dialect(source.kind, options)[1]):
        content = content.replace(b"\r", b"\n")
    find_header(source, options, content, is_whole=is_whole)


def _other_delimiter(names: list[str]) -> str:
    """The advice for a header that seems to have another delimiter."""
    if names[0].lower().startswith("sep="):
        return "; remove the line sep= that Excel wrote, and give its character as --delimiter"
    if len(names) != 1:
        return ""
    if "\n" in names[0]:
        return "; a quote that opens in the header is not closed: mend it, or see --quoting"
    found = max(_DELIMITERS, key=names[0].count)
    return (
        f"; if they are separated by {_DELIMITERS[found]}: --delimiter {_DELIMITERS[found]}"
        if found in names[0]
        else ""
    )


def _after_lines(data: bytes, num_lines: int) -> int:
    """The offset of the line after the first `num_lines`."""
    end = 0
    for _ in range(num_lines):
        end = data.find(b"\n", end) + 1 or len(data)
    return end


def no_column(path: str, name: str, columns: Sequence[str], more: str = "") -> DataError:
    """The error for a table without the column `name`."""
    shown = ", ".join(
        column if column == column.strip() and column.isprintable() else repr(column) for column in columns
    )
    if not columns:
        return DataError(f"{path}: no column {name!r}: it has no columns at all; leave it out")
    return DataError(f"{path}: no column {name!r}; the columns are: {shown}; choose one with --json-key{more}")


def several_columns(path: str, name: str, columns: Sequence[str]) -> DataError:
    """The error for a table in which several columns have the name `name`."""
    return DataError(f"{path}: {list(columns).count(name)} columns are named {name!r}; rename one")
