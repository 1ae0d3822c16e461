"""Plain text to documents: by blank lines, by lines, or one per file."""

from __future__ import annotations

import re
from collections.abc import Iterator

from data_tools.readers.chunks import Block
from data_tools.readers.cutting import too_long
from data_tools.readers.faults import Faults
from data_tools.readers.options import ReadOptions

# Only line ends count: U+2028 and its kin may stand inside a text.
_BLANK_LINES = re.compile(r"\n(?:[ \t\r\x0b\x0c]*\n)+")
_BLANK_LINES_BYTES = re.compile(rb"\n(?:[ \t\r\x0b\x0c]*\n)+")


def parse_text(path: str, block: Block, options: ReadOptions, faults: Faults) -> list[str]:
    """The documents of a block, with \\n for every line end and none around them. Raises DataError as `Faults`."""
    if len(block.data) <= options.max_document_bytes:
        try:
            return _split(block.data.decode("utf-8"), options.text_documents)
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
        elif (text := faults.decode(data, path, line, byte)) is not None:
            texts += _split(text, "file")
    return texts


def _split(text: str, by: str) -> list[str]:
    text = text.replace("\r\n", "\n")
    if by == "line":
        return [line for line in text.split("\n") if line.strip(" \t\r\x0b\x0c")]
    parts = [text] if by == "file" else _BLANK_LINES.split("\n" + text + "\n")
    return [body for part in parts if (body := part.strip("\n"))]


def _documents(data: bytes, by: str) -> Iterator[tuple[int, bytes]]:
    """The bytes of each document that is not blank, and where they begin."""
    separators = {"line": re.compile(rb"\n"), "blank-line": _BLANK_LINES_BYTES, "file": re.compile(rb"(?!)")}[by]
    start = 0
    # The line end put before it lets a blank first line be found; offsets are one more than in `data`.
    for match in separators.finditer(b"\n" + data + b"\n"):
        body = data[start : max(match.start() - 1, 0)]
        if body.strip():
            yield start, body.removesuffix(b"\r")
        start = match.end() - 1
    if data[start:].strip():
        yield start, data[start:].removesuffix(b"\r")
