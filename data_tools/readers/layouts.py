"""The first decompressed bytes of a file of lines or records: encodings and layouts that are not read.

Such a file is sound, so it is an error in every --on-error mode: else it would be lost as thousands of broken lines.
"""

from __future__ import annotations

import json
import re

from data_tools.readers.chunks import Source, excerpt
from data_tools.readers.cutting import BOM
from data_tools.readers.formats import HEAD_BYTES, inside_advice, is_text, recognise, refuse_page, unpacked
from data_tools.readers.options import ReadOptions
from pretrain.errors import DataError

LOOK_BYTES = 1 << 16
_WARC = b"WARC/"
_UTF32 = (b"\xff\xfe\0\0", b"\0\0\xfe\xff")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def refuse_layout(source: Source, options: ReadOptions, content: bytes) -> None:
    """Checks the first decompressed bytes of a file that is no table.

    Raises:
        DataError: they are UTF-16, a JSON array, an archive, or have lines that end in CR alone.
    """
    content = content[:LOOK_BYTES]
    _refuse_encoding(source, content)
    if source.compression and (found := recognise(content[:HEAD_BYTES])) is not None:
        remedy = inside_advice(source.path, found, source.kind, source.compression)
        raise DataError(f"{source.path}: is {found.name} inside its compression; {remedy}")
    content = content.removeprefix(BOM)
    if source.kind == "jsonl":
        refuse_page(source.path, content[:HEAD_BYTES])
        _refuse_json_document(source, content)
    start = content.lstrip(b"\r\n")[:HEAD_BYTES]
    if source.kind == "wet" and is_text(start) and start[:5] != _WARC[: len(start)]:
        begin = excerpt(start[:40].partition(b"\n")[0])
        raise DataError(f"{source.path}: is not a WARC or WET file: it begins with {begin!r}; see --input-format")
    if source.kind == "jsonl" or (source.kind == "txt" and options.text_documents != "file"):
        _refuse_carriage_returns(source, content)


def _refuse_encoding(source: Source, content: bytes) -> None:
    if content.startswith(_UTF32):
        name, code = "UTF-32", "utf-32"
    elif content.startswith(_UTF16):
        name, code = "UTF-16", "utf-16"
    elif wide := _wide_code(content[:HEAD_BYTES]):
        name, code = f"{wide.upper()} without a byte-order mark", wide
    else:
        return
    command = unpacked(source.path, source.compression, f"iconv -f {code} -t utf-8", f".{source.kind}")
    raise DataError(f"{source.path}: is {name}; convert it, for example with {command}")


def _wide_code(head: bytes) -> str:
    """UTF-16 or UTF-32 by the zeros of its ASCII letters, at every second byte or three of four; "" for others."""
    if len(head) < 8:
        return ""
    zeros = "".join("0" if 2 * head[start::4].count(0) > len(head) // 4 else "x" for start in range(4))
    return {"x000": "utf-32le", "000x": "utf-32be", "x0x0": "utf-16le", "0x0x": "utf-16be"}.get(zeros, "")


def _refuse_json_document(source: Source, content: bytes) -> None:
    """Refuses an array, and an object on several lines: both are JSON, but not one object per line."""
    if not content.lstrip().startswith((b"[", b"{")):
        return
    lines = [stripped for line in content.split(b"\n") if (stripped := line.strip())]
    first, second = lines[0], lines[1] if len(lines) > 1 else b""
    if first.startswith(b"["):
        # On one line, or cut where this function looks; an array among other lines is a fault of its own line.
        is_document = not second and (_is_json(first) or len(content) >= LOOK_BYTES - len(BOM))
        is_document |= bool(second) and (first.endswith((b"[", b"{", b",")) or second.startswith(b","))
        what, command = "a JSON array", "jq -c '.[]'"
    else:
        # Without a second line, the first is cut where this function looks, perhaps behind a bracket in a text.
        is_document = bool(second) and first.endswith(b"[")
        is_document |= first.endswith((b"{", b",")) and second.startswith(b'"')
        what, command = "JSON on several lines", "jq -c ."
    if is_document and not any(map(_is_record, lines, [*lines[1:], b"]"])):
        remedy = unpacked(source.path, source.compression, command, ".jsonl")
        raise DataError(f"{source.path}: is {what}, not one object per line; make lines of it with {remedy}")


def _is_record(line: bytes, following: bytes) -> bool:
    """Whether a line is an object by itself, not the last element of an array that goes on with `following`."""
    return line.startswith(b"{") and not following.startswith((b"]", b",", b"}")) and _is_json(line)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_carriage_returns(source: Source, content: bytes) -> None:
    if b"\n" not in content and re.search(rb"\r[^\r].*\r", content, re.DOTALL):
        command = unpacked(source.path, source.compression, "tr '\\r' '\\n'", f".{source.kind}", reads_name=False)
        raise DataError(f"{source.path}: lines end in CR alone; convert them, for example with {command}")
