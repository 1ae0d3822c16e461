"""Reads texts from comma- and tab-separated values: one record per document, the text in one column.

csv follows RFC 4180: a quoted field may hold delimiters, line ends and doubled quotes. tsv has no quoting, like GLUE's
files: every line is a record, and a quote is an ordinary character. `ReadOptions.quoting` overrides both.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import replace

from data_tools.readers.chunks import Block, Piece, Reject, Source, excerpt
from data_tools.readers.cutting import Rule, RuleScanner, Scanner
from data_tools.readers.faults import Faults, not_utf8
from data_tools.readers.options import ReadOptions
from data_tools.readers.streams import stream_blocks
from pretrain.errors import DataError

_QUOTE = ord('"')
_FIELD_LIMIT = 2**31 - 1  # the largest C long on platforms where it has 32 bits


def cut_delimited(source: Source, options: ReadOptions, faults: Faults) -> Iterator[Piece]:
    """Chunks of whole records.

    Raises:
        DamagedError: as `stream_blocks`.
        DataError: the column is missing.
    """
    delimiter, is_quoted = _dialect(source.kind, options)
    scanner: Scanner = RecordScanner(delimiter) if is_quoted else RuleScanner(Rule("line"))
    column, num_columns = -1, 0
    for block, progress in stream_blocks(source, options, scanner, faults):
        if column < 0:
            column, num_columns, block = _take_header(source, options, block)
        yield Piece(Block(block.data, block.first_line, block.first_byte, column, num_columns), 0, progress)


class RecordScanner:
    """Finds record ends outside quotes. A quote opens a quoted field only at its start, as in Python's csv."""

    what = "record"

    def __init__(self, delimiter: str) -> None:
        self._openers = frozenset(f"{delimiter}\n\r".encode())
        self.is_inside = False
        self._previous = ord("\n")
        self._is_undecided = False  # the last byte was a quote inside quotes: the closing one, or the first of two

    def scan(self, block: bytes, *, wants_first: bool) -> tuple[int, int]:
        """As `Scanner`."""
        first = last = position = 0
        if self._is_undecided:
            self._is_undecided = False
            self.is_inside = block[0] == _QUOTE
            position = int(self.is_inside)
        while position < len(block):
            quote = block.find(b'"', position)
            end = quote if quote >= 0 else len(block)
            if not self.is_inside:
                last = block.rfind(b"\n", position, end) + 1 or last
                first = first or (block.find(b"\n", position, end) + 1 if wants_first else 0)
                if quote >= 0:
                    self.is_inside = (block[quote - 1] if quote else self._previous) in self._openers
                position = end + 1
            elif quote < 0:
                break
            elif quote + 1 == len(block):
                self._is_undecided, position = True, quote + 1
            elif block[quote + 1] == _QUOTE:
                position = quote + 2
            else:
                self.is_inside, position = False, quote + 1
        self._previous = block[-1]  # blocks of a stream are not empty
        return first, last


def parse_delimited(path: str, block: Block, kind: str, options: ReadOptions, faults: Faults) -> list[str]:
    """The fields of the text column, in order; blank lines are skipped. Raises DataError as `Faults`."""
    decode_error: UnicodeDecodeError | None = None
    try:
        text = block.data.decode("utf-8")
    except UnicodeDecodeError as error:
        decode_error, text = error, block.data.decode("utf-8", "surrogateescape")
    texts = []
    for line, row in _rows(path, text, block.first_line, kind, options, faults):
        if len(row) != block.num_columns:
            message = f"a record of {len(row)} fields, expected {block.num_columns}; mend or remove it"
            faults.add(Reject(path, line, None, "ragged_record", excerpt(repr(row)), message))
        elif decode_error is None or _is_unicode(row):
            texts.append(row[block.column])
        elif faults.replaces:
            faults.replaced += 1
            texts.append(row[block.column].encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
        else:
            # In a run that stops at faults this is the first such record, so the decoding error is its own.
            reject = not_utf8(path, decode_error, block.first_line, block.first_byte)
            faults.add(reject if faults.stops else replace(reject, line=line, byte=None, excerpt=excerpt(ascii(row))))
    return texts


def _rows(
    path: str, text: str, first_line: int, kind: str, options: ReadOptions, faults: Faults
) -> Iterator[tuple[int, list[str]]]:
    """The fields of each record, with the line on which it begins."""
    delimiter, is_quoted = _dialect(kind, options)
    if not is_quoted:
        for number, record in enumerate(text.split("\n"), start=first_line):
            if record.strip("\r"):
                yield number, record.removesuffix("\r").split(delimiter)
        return
    csv.field_size_limit(min(options.max_document_bytes, _FIELD_LIMIT))
    reader = csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True)
    while True:
        line = first_line + reader.line_num
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            message = f"broken record ({error}); mend or remove it, or read without quoting: --quoting none"
            faults.add(Reject(path, line, None, "broken_record", "", message))
            continue
        if row:
            yield line, row


def _is_unicode(row: list[str]) -> bool:
    try:
        "".join(row).encode()
    except UnicodeEncodeError:
        return False
    return True


def _dialect(kind: str, options: ReadOptions) -> tuple[str, bool]:
    """The delimiter, and whether quotes are special."""
    delimiter = options.delimiter or ("\t" if kind == "tsv" else ",")
    return delimiter, options.quoting == "rfc4180" or (options.quoting == "auto" and kind == "csv")


def _take_header(source: Source, options: ReadOptions, block: Block) -> tuple[int, int, Block]:
    """The index of the text column, from 0, the number of columns, and the block without the header."""
    text = block.data.decode("utf-8", "replace")
    delimiter, is_quoted = _dialect(source.kind, options)
    lines = io.StringIO(text, newline="\n")
    if is_quoted:
        reader = csv.reader(lines, delimiter=delimiter)
        names = next(reader, [])
        num_lines = reader.line_num
    else:
        names, num_lines = lines.readline().rstrip("\r\n").split(delimiter), 1
    if not options.has_header:
        column = int(options.json_key) - 1
        if column >= len(names):
            raise DataError(
                f"{source.path}: no column {options.json_key}: its first record has {len(names)}; "
                "choose another with --json-key, or see --delimiter"
            )
        return column, len(names), block
    if options.json_key not in names:
        raise no_column(source.path, options.json_key, names)
    end = _after_lines(block.data, num_lines)
    rest = Block(block.data[end:], block.first_line + num_lines, block.first_byte + end)
    return names.index(options.json_key), len(names), rest


def _after_lines(data: bytes, num_lines: int) -> int:
    """The offset of the line after the first `num_lines`."""
    end = 0
    for _ in range(num_lines):
        end = data.find(b"\n", end) + 1 or len(data)
    return end


def no_column(path: str, name: str, columns: list[str]) -> DataError:
    """The error for a table without the column `name`."""
    return DataError(f"{path}: no column {name!r}; the columns are: {', '.join(columns)}; choose one with --json-key")
