"""Splits plain text into documents: by blank lines, by lines, or one per file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial

from data_tools.readers.chunks import Block
from data_tools.readers.cutting import BLANKS, too_long
from data_tools.readers.faults import Faults, not_utf8
from data_tools.readers.options import ReadOptions

# Only line feeds count: U+2028 and the like may be part of a text.
_BLANK_LINES = re.compile(rb"\n(?:[ \t\r\x0b\x0c]*\n)+")


def parse_text(path: str, block: Block, options: ReadOptions, faults: Faults) -> list[str]:
    """The documents of a block, with \\n for every line end and none at either end. Raises DataError as `Faults`."""
    if len(block.data) <= options.max_document_bytes:
        try:
            return [body.decode("utf-8") for body in _split(block.data, options.text_documents)]
        except UnicodeDecodeError:
            pass
    texts = []
    counted, line = 0, block.first_line
    for start, data in _documents(block.data, options.text_documents):
        line, byte = line + block.data.count(b"\n", counted, start), block.first_byte + start
        counted = start
        if len(data) > options.max_document_bytes:
            what = "line" if options.text_documents == "line" else "document"
            faults.add(too_long(path, line, byte, what, options.max_document_bytes, data))
        elif (text := faults.decode(data, partial(not_utf8, path, line=line, byte=byte))) is not None:
            texts += [body.decode("utf-8") for body in _split(text.encode(), "file")]
    return texts


def _split(data: bytes, by: str) -> list[bytes]:
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n")
    if by == "line":
        return [line for line in data.split(b"\n") if line.strip(BLANKS)]
    # With a line end put before it, a blank first line is recognised; the one after the last line is stripped again.
    parts = [data] if by == "file" else _BLANK_LINES.split(b"\n" + data + b"\n")
    return [body for part in parts if (body := part.strip(b"\n"))]


def _documents(data: bytes, by: str) -> Iterator[tuple[int, bytes]]:
    """The offset and bytes of each document that is not blank."""
    separators = {"line": re.compile(rb"\n"), "blank-line": _BLANK_LINES, "file": re.compile(rb"(?!)")}[by]
    start = 0
    # With a line end put before it, a blank first line is found; offsets are one more than in `data`.
    for match in separators.finditer(b"\n" + data + b"\n"):
        body = data[start : max(match.start() - 1, 0)]
        if body.strip():
            yield start, body.removesuffix(b"\r")
        start = match.end() - 1
    if data[start:].strip():
        yield start, data[start:].removesuffix(b"\r")
