"""Handles faults: an error with the location stops the run, or the document is left out and counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from data_tools.readers.byte_ranges import count_lines
from data_tools.readers.chunks import LineSpan, Reject, excerpt
from data_tools.readers.options import OnError
from pretrain.errors import DataError

_NEAR_BYTES = 64


class Faults:
    """Collects rejects, or raises the first one as an error."""

    def __init__(self, on_error: OnError, lines_before: Callable[[], int] | None = None) -> None:
        """`lines_before` returns the number to add to the faults' line numbers; called only for an error."""
        self.replaces = on_error == "replace"
        self.stops = on_error == "stop"
        self._lines_before = lines_before
        self.rejects: list[Reject] = []
        self.replaced = 0

    def add(self, reject: Reject) -> None:
        """Records `reject`. Raises DataError: faults stop the run."""
        if not self.stops:
            self.rejects.append(reject)
            return
        if self._lines_before is not None and reject.line is not None:
            reject = replace(reject, line=reject.line + self._lines_before())
        raise reject.error()

    def take(self) -> list[Reject]:
        """Returns the rejects so far and clears them."""
        rejects, self.rejects = self.rejects, []
        return rejects

    def decode(self, data: bytes, fault: Callable[[UnicodeDecodeError], Reject]) -> str | None:
        """The text of `data`; None if it is left out as the reject that `fault` returns."""
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            if self.replaces:
                self.replaced += 1
                return data.decode("utf-8", "replace")
            self.add(fault(error))
            return None


def not_utf8(path: str, error: UnicodeDecodeError, line: int, byte: int) -> Reject:
    """The fault of bytes that are not UTF-8 and begin at `line` and `byte` of the file."""
    value = error.object[error.start]
    around = error.object[max(error.start - _NEAR_BYTES, 0) : error.start + _NEAR_BYTES]
    line, byte = line + error.object.count(b"\n", 0, error.start), byte + error.start
    # These are letters and quotes in Windows' code page, and control characters in Latin-1.
    code = "windows-1252" if 0x80 <= value < 0xA0 else "latin1"
    hint = f"convert the file, for example with `iconv -f {code} -t utf-8`"
    if around.count(0) > 1:
        hint = "it does not look like text; `file` says what it may be"
    message = f"byte {byte} (0x{value:02x}) is not UTF-8: {error.reason}; {hint}"
    return Reject(path, line, byte, "not_utf8", excerpt(error.object[max(error.start - 20, 0) :]), message)


def damaged_file(path: str, error: DataError, num_bytes: int | None) -> Reject:
    """The fault of a file whose rest, from decompressed byte `num_bytes` on, is lost."""
    message = str(error).removeprefix(f"{path}: ")
    return Reject(path, None, num_bytes, "damaged_file", "", f"the rest of the file is lost: {message}")


class LineNumbers:
    """Turns line numbers of a chunk into those of its file, in the process that collects the rejects.

    Pass it the chunks in order. Lines in a gap, as after a resume, are counted in the file, so each file is read at
    most once.
    """

    def __init__(self) -> None:
        self._path, self._byte, self._lines = "", 0, 0

    def locate(self, rejects: list[Reject], span: LineSpan | None) -> list[Reject]:
        """The rejects of one chunk with line numbers of the file; takes `ParsedChunk.rejects` and `.lines`.

        Raises:
            DataError: the file can no longer be read.
        """
        if span is None:
            return rejects
        if span.path != self._path or span.first_byte < self._byte:
            self._path, self._byte, self._lines = span.path, 0, 0
        if rejects or span.first_byte == self._byte:
            if self._byte < span.first_byte:
                self._lines += count_lines(span.path, self._byte, span.first_byte)
            located = [_shifted(reject, self._lines) for reject in rejects]
            self._byte, self._lines = span.end_byte, self._lines + span.num_lines
            return located
        return rejects


def _shifted(reject: Reject, lines: int) -> Reject:
    return reject if reject.line is None else replace(reject, line=reject.line + lines)
