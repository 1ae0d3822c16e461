"""Where documents begin: one rule, by which plain files are cut at offsets and streams as they are read.

A cut point is an offset at which one document has ended: after every line end if a line is a document (JSON lines, text
by lines), after every blank line if blank lines separate documents. The bytes between two adjacent cut points hold one
document or none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO, Literal, Protocol

from data_tools.readers.chunks import Reject, excerpt

BOM = b"\xef\xbb\xbf"
BLANKS = b" \t\r\x0b\x0c"
_BLANK_LINE = re.compile(rb"\n(?=[ \t\r\x0b\x0c]*(\n))")
_SEARCH_BYTES = 1 << 18


@dataclass(frozen=True)
class Rule:
    """Where the cut points are: after every "line", after every "blank-line", or "never", if a file is a document."""

    by: Literal["line", "blank-line", "never"]

    @property
    def by_blank_lines(self) -> bool:
        return self.by == "blank-line"

    @property
    def what(self) -> str:
        """The name of a document in messages."""
        return "line" if self.by == "line" else "document"

    def last(self, data: bytes, is_blank: bool = True) -> int:
        """The last cut point of `data`, 0 for none; `is_blank`: only blanks precede `data` in its first line."""
        end = -1 if self.by == "never" else data.rfind(b"\n")
        while end >= 0:
            before = data.rfind(b"\n", 0, end)
            if not self.by_blank_lines or ((before >= 0 or is_blank) and not data[before + 1 : end].strip(BLANKS)):
                return end + 1
            end = before
        return 0

    def first(self, data: bytes, is_blank: bool) -> int:
        """The first cut point of `data`, 0 for none; `is_blank` as in `last`."""
        if not self.by_blank_lines:
            return 0 if self.by == "never" else data.find(b"\n") + 1
        match = _BLANK_LINE.search(b"\n" + data if is_blank else data)
        return 0 if match is None else match.end(1) - is_blank

    def ends_blank(self, data: bytes, is_blank: bool) -> bool:
        """Whether the last, incomplete line of `data` is blank so far."""
        last = data.rfind(b"\n")
        return (last >= 0 or is_blank) and not data[last + 1 :].strip(BLANKS)

    def search(self, file: BinaryIO, low: int, bound: int) -> int:
        """The first cut point in [low, bound] of a seekable `file` of at least `bound` bytes; -1 for none."""
        if low == 0:
            return 0
        # The byte before `low` counts: a line end there makes `low` a cut point.
        position = low - 1
        is_blank = self.by_blank_lines and self._is_blank_before(file, position)
        file.seek(position)
        while position < bound and (data := file.read(min(_SEARCH_BYTES, bound - position))):
            cut = self.first(data, is_blank)
            if cut:
                return position + cut
            position += len(data)
            is_blank = self.by_blank_lines and self.ends_blank(data, is_blank)
        return -1

    def _is_blank_before(self, file: BinaryIO, position: int) -> bool:
        """Whether there are only blanks between the start of the line and `position`."""
        while position > 0:
            low = max(position - _SEARCH_BYTES, 0)
            file.seek(low)
            before = file.read(position - low).rstrip(BLANKS)
            if before:
                return before.endswith(b"\n")
            position = low
        return True


class Scanner(Protocol):
    """Finds cut points in the blocks of a stream, which must come in order; it keeps state between blocks."""

    what: str

    def scan(self, block: bytes, *, wants_first: bool) -> tuple[int, int]:
        """The first (if `wants_first`) and the last cut point in `block`, 0 for none."""
        ...


class RuleScanner:
    """Cut points of a rule."""

    def __init__(self, rule: Rule) -> None:
        self._rule, self._is_blank = rule, True
        self.what = rule.what

    def scan(self, block: bytes, *, wants_first: bool) -> tuple[int, int]:
        """As `Scanner`."""
        first = self._rule.first(block, self._is_blank) if wants_first else 0
        last = self._rule.last(block, self._is_blank)
        self._is_blank = self._rule.by_blank_lines and self._rule.ends_blank(block, self._is_blank)
        return first, last


def cut_stream(
    path: str,
    blocks: Iterator[tuple[bytes, int]],
    scanner: Scanner,
    limit: int,
    fail: Callable[[Reject], None],
    *,
    stops: bool = False,
) -> Iterator[tuple[bytes, int, int, int]]:
    """Joins blocks and cuts them at cut points: (data, number of its first line, its first byte, bytes on disk).

    A document of more than `limit` bytes is passed to `fail` and, if that returns, left out; memory stays bounded.
    `stops`: `fail` will raise, so it is called as soon as the document is too long, else when its end is known.
    """
    pending: list[bytes] = []
    pending_bytes, line, offset, progress = 0, 1, 0, 0
    dropped: Reject | None = None
    ends_line = True
    for block, progress in blocks:
        ends_line = block.endswith(b"\n")
        first, end = scanner.scan(block, wants_first=dropped is not None)
        if dropped is not None:
            num_dropped = first or len(block)
            line, offset = line + block.count(b"\n", 0, num_dropped), offset + num_dropped
            block, end = block[num_dropped:], max(end - num_dropped, 0)
            if first:
                fail(_with_extent(dropped, line - 1, offset))
                dropped = None
        if end:
            data = b"".join([*pending, block[:end]])
            yield data, line, offset, progress
            line, offset = line + data.count(b"\n"), offset + len(data)
            pending, pending_bytes = [], 0
        if end < len(block):
            pending.append(block[end:])
            pending_bytes += len(block) - end
        if pending_bytes > limit:
            dropped = too_long(path, line, offset, scanner.what, limit, pending[0])
            if stops:
                fail(dropped)
            line, offset = line + sum(part.count(b"\n") for part in pending), offset + pending_bytes
            pending, pending_bytes = [], 0
    if dropped is not None:
        fail(_with_extent(dropped, line - ends_line, offset))
    if pending:
        yield b"".join(pending), line, offset, progress


def _with_extent(reject: Reject, last_line: int, end: int) -> Reject:
    """The fault of a document that is too long, with what is lost; a quote that is never closed may lose much."""
    if reject.line is None or reject.byte is None or last_line <= reject.line:
        return reject
    words = f"lines {reject.line:,} to {last_line:,} ({end - reject.byte:,} bytes) are lost: "
    return replace(reject, message=words + reject.message)


def too_long(path: str, line: int, byte: int, what: str, limit: int, data: bytes) -> Reject:
    """The fault of a document (or line) of more than `limit` bytes that begins with `data`."""
    message = f"a {what} of more than {limit} bytes; split it, remove it, or raise --max-document-bytes"
    return Reject(path, line, byte, "too_many_bytes", excerpt(data), message)
