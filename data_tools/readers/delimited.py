"""Reads texts from comma- and tab-separated values: one record per document, the text in one column.

csv follows RFC 4180: a quoted field may hold delimiters, line ends and doubled quotes. tsv has no quoting, like GLUE's
files: every line is a record, and a quote is an ordinary character. `ReadOptions.quoting` overrides both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from data_tools.readers.chunks import Block, Piece, Reject, Source, excerpt
from data_tools.readers.cutting import Rule, RuleScanner, Scanner, too_long
from data_tools.readers.faults import Faults, not_utf8
from data_tools.readers.headers import Header, find_header
from data_tools.readers.options import ReadOptions
from data_tools.readers.records import dialect, records, with_line_feeds
from data_tools.readers.streams import stream_blocks

_QUOTE = ord('"')


def cut_delimited(source: Source, options: ReadOptions, faults: Faults) -> Iterator[Piece]:
    """Chunks of whole records.

    Raises:
        DamagedError: as `stream_blocks`.
        DataError: the column is missing.
    """
    delimiter, is_quoted = dialect(source.kind, options)
    scanner: Scanner = RecordScanner(delimiter) if is_quoted else RuleScanner(Rule("line"))
    header: Header | None = None
    for block, progress in stream_blocks(
        source, options, scanner, faults, partial(with_line_feeds, is_quoted=is_quoted)
    ):
        if header is None:
            header = find_header(source, options, block.data)
            if header is None:  # blank lines only
                continue
            end, line = block.first_byte + header.num_bytes, block.first_line + header.num_lines
            block = Block(block.data[header.num_bytes :], line, end)
        place = Block(block.data, block.first_line, block.first_byte, header.column, header.num_columns)
        yield Piece(place, 0, progress)


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
    limit = options.max_document_bytes if len(block.data) > options.max_document_bytes else 0
    for line, row in records(path, text, block, dialect(kind, options), faults):
        if len(row) != block.num_columns:
            message = f"a record of {len(row)} fields, expected {block.num_columns}; mend or remove it"
            faults.add(Reject(path, line, None, "ragged_record", excerpt(repr(row)), message))
        elif limit and len(row[block.column].encode("utf-8", "surrogateescape")) > limit:
            fault = too_long(path, line, 0, "field", limit, row[block.column][:400].encode("utf-8", "surrogateescape"))
            faults.add(replace(fault, byte=None))
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


def _is_unicode(row: list[str]) -> bool:
    try:
        "".join(row).encode()
    except UnicodeEncodeError:
        return False
    return True
