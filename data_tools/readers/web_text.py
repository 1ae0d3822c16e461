"""Reads texts from Common Crawl's WET files: the plain-text `conversion` records of a WARC file, and no others.

A record is a header (`WARC/1.0`, then `Name: value` lines, then an empty line) and Content-Length bytes of content.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from data_tools.readers.chunks import Block, Piece, Source
from data_tools.readers.compression import DamagedError
from data_tools.readers.cutting import too_long
from data_tools.readers.faults import Faults, not_utf8
from data_tools.readers.options import ReadOptions
from data_tools.readers.streams import stream_blocks
from pretrain.errors import DataError

_HEADER_END = b"\r\n\r\n"
_MAX_HEADER_BYTES = 1 << 16


def cut_web_text(source: Source, options: ReadOptions, faults: Faults) -> Iterator[Piece]:
    """Chunks of whole records.

    Raises:
        DamagedError: as `stream_blocks`, or a record is invalid or truncated.
        DataError: the file holds no text, like a WARC file of responses.
    """
    scanner = RecordScanner(source.path)
    for block, progress in stream_blocks(source, options, scanner, faults):
        # The last block of a stream may end with an incomplete record, which is left out.
        data = block.data[: max(scanner.last_end - block.first_byte, 0)]
        yield Piece(replace(block, data=data), 0, progress)
    scanner.require_end()
    if not scanner.num_texts and not faults.rejects:
        raise DataError(f"{source.path}: holds no conversion record; give WET files, which hold the text of pages")


class RecordScanner:
    """Finds the ends of records from their lengths."""

    what = "record"

    def __init__(self, path: str) -> None:
        self._path = path
        self._offset = 0  # bytes scanned
        self._content_bytes = 0  # remaining in the current record
        self._header = b""  # of the next record, as far as it has been read
        self._damage: str | None = None
        self.last_end = 0
        self.num_texts = 0

    def scan(self, block: bytes, *, wants_first: bool) -> tuple[int, int]:
        """As `Scanner`. Raises DamagedError: the previous block has an invalid record."""
        self._raise_damage()
        first = last = position = 0
        while position < len(block) and self._damage is None:
            if not self._content_bytes:
                position, is_whole = self._take_header(block, position)
                if not is_whole:
                    continue
            step = min(self._content_bytes, len(block) - position)
            self._content_bytes -= step
            position += step
            if not self._content_bytes:
                last = position
                first = first or last
        self.last_end = self._offset + last if last else self.last_end
        self._offset += len(block)
        return first, last

    def require_end(self) -> None:
        """Raises DamagedError: the last record is invalid or truncated."""
        if self._content_bytes or self._header:
            self._damage = self._damage or "a truncated record"
        self._raise_damage()

    def _take_header(self, block: bytes, position: int) -> tuple[int, bool]:
        """The end in `block` of the header that continues at `position`, and whether it is complete now."""
        piece = block[position : position + _MAX_HEADER_BYTES]
        head = (self._header + piece).lstrip(b"\r\n")
        end = head.find(_HEADER_END)
        if end < 0:
            self._header = head
            if len(head) > _MAX_HEADER_BYTES or not (head + b"WARC/"[len(head) :]).startswith(b"WARC/"):
                self._damage = "data that is not a WARC record"
            return position + len(piece), False
        self._header = b""
        length, is_text = _read_header(head[:end])
        if length < 0:
            self._damage = "a record without a Content-Length"
            return len(block), False
        self._content_bytes = length
        self.num_texts += is_text
        return position + len(piece) - (len(head) - end - len(_HEADER_END)), True

    def _raise_damage(self) -> None:
        if self._damage is not None:
            message = f"{self._path}: damaged: {self._damage} follows byte {self.last_end}; fetch it again"
            raise DamagedError(message, self.last_end)


def parse_web_text(path: str, block: Block, options: ReadOptions, faults: Faults) -> list[str]:
    """The contents of conversion records, in order, with \\n for every line end. Raises DataError as `Faults`."""
    texts = []
    data, line, counted = block.data, block.first_line, 0
    for start, end in _contents(data):
        line, counted = line + data.count(b"\n", counted, start), start
        content, byte = data[start:end], block.first_byte + start
        if len(content) > options.max_document_bytes:
            faults.add(too_long(path, line, byte, "record", options.max_document_bytes, content))
        elif (text := faults.decode(content, partial(not_utf8, path, line=line, byte=byte))) is not None:
            texts.append(text.replace("\r\n", "\n").strip("\n"))
    return texts


def _contents(data: bytes) -> Iterator[tuple[int, int]]:
    """The offsets [start, end) of each conversion record's content in `data`, which holds whole records."""
    position = 0
    while (end := data.find(_HEADER_END, position)) >= 0:
        length, is_text = _read_header(data[position:end].lstrip(b"\r\n"))
        start = end + len(_HEADER_END)
        position = start + length
        if is_text:
            yield start, position
        while data[position : position + 2] == b"\r\n":
            position += 2


def _read_header(header: bytes) -> tuple[int, bool]:
    """The length of the content (-1: missing or invalid), and whether it is the text of a page."""
    fields = dict(line.lower().partition(b":")[::2] for line in header.split(b"\r\n")[1:])
    length = fields.get(b"content-length", b"").strip()
    is_sound = header.startswith(b"WARC/") and length.isdigit() and len(length) < 19
    return (int(length) if is_sound else -1), fields.get(b"warc-type", b"").strip() == b"conversion"
