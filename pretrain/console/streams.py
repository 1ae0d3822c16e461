"""Standard streams that a program can rely on: closed, full, gone and ASCII ones end no program in a traceback."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from pretrain.errors import TacoError

# What a shell reports of a program that SIGPIPE ended.
EXIT_OUTPUT_GONE = 141


class _OutputGoneError(Exception):
    """Nobody reads standard output any more, as behind `| head`. No OSError: click would end with its own code."""


class _StandardOutput(io.FileIO):
    """Descriptor 1; a failed write is told from that of any other file."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise _OutputGoneError from None
        except OSError as error:
            raise TacoError(f"standard output: cannot be written: {error.strerror}") from None


class _StandardError(io.FileIO):
    """Descriptor 2; what cannot be said, as on a terminal that is gone, ends no run."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(memoryview(data).cast("B"))


@contextmanager
def standard_streams() -> Iterator[None]:
    """Gives the process three standard streams that a program can rely on, and empties standard output at the end.

    A stream that is closed becomes `/dev/null`, or the next file that is opened would get its number and its content.
    Standard input is opened for writing then, by which a reader of it sees that there was none.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_WRONLY)  # takes the lowest free number
    streams = sys.stdin, sys.stdout, sys.stderr
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115 - for the whole process
    sys.stdout = _rewrapped(sys.stdout, sys.__stdout__, _StandardOutput, 1)
    sys.stderr = _rewrapped(sys.stderr, sys.__stderr__, _StandardError, 2)
    try:
        yield
    except SystemExit as error:
        _empty_output(0 if error.code is None else error.code)
        raise
    except _OutputGoneError:
        _discard_output()
        sys.exit(EXIT_OUTPUT_GONE)
    else:
        _empty_output(0)
    finally:
        sys.stdin, sys.stdout, sys.stderr = streams


def _rewrapped(now: TextIO | None, first: TextIO | None, kind: type[io.FileIO], number: int) -> TextIO:
    """The stream `now` over a file of `kind`; itself if it is not the process's own, as in tests."""
    if now is not None and (now is not first or not isinstance(now, io.TextIOWrapper)):
        return now
    raw = kind(number, "w", closefd=False)
    if now is None:
        return io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", errors="backslashreplace")
    now.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=now.encoding,
        errors="backslashreplace" if now.errors == "strict" else now.errors,  # an ASCII terminal stops no program
        # With PYTHONUNBUFFERED Python's own streams write through and buffer no lines; these have a buffer below.
        line_buffering=now.line_buffering or now.write_through or number == 2,
    )


def _empty_output(code: int | str) -> None:
    """Writes out what standard output holds back; ends the process if that fails, with `code` if it is an error."""
    try:
        sys.stdout.flush()
    except _OutputGoneError:
        _discard_output()
        sys.exit(code or EXIT_OUTPUT_GONE)
    except TacoError as error:
        _discard_output()
        if not code:  # else the program has already said why it ends
            print(f"error: {error}", file=sys.stderr)
        sys.exit(code or error.exit_code)


def _discard_output() -> None:
    """Lets what standard output still holds go nowhere: Python would complain of it as it ends."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
