"""What people read during a run: rank-aware logging, one console line per logging step, progress with an ETA.

Rank 0 writes to the console; every rank writes its own file under logs/. What ranks have in common is read once, so
warnings of the others, their libraries' included, are in their files alone.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

_ROOT = "taco"
# Those whose loggers have handlers of their own.
_LIBRARIES = ("DeepSpeed", "transformers", "torch")


def get_logger(name: str) -> logging.Logger:
    """A logger below the program's own root, so that libraries' loggers keep their levels."""
    return logging.getLogger(f"{_ROOT}.{name.removeprefix('pretrain.')}")


def start_logging(log_dir: Path | None, rank: int) -> None:
    """Console on rank 0 (errors on the others), and logs/rank_00000.log for every rank.

    A log folder that cannot be written causes a warning, and never ends the run.
    """
    root = logging.getLogger(_ROOT)
    root.setLevel(logging.INFO)
    root.propagate = False
    root.handlers.clear()
    console = _ConsoleHandler()
    console.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    console.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    root.addHandler(console)
    if rank != 0:
        _keep_libraries_quiet(console)
    if log_dir is None:
        return
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        path = log_dir / f"rank_{rank:05d}.log"
        _end_last_line(path)
        file = _RankFile(path, encoding="utf-8")
    except OSError as error:
        root.warning("no log file: %s", error)
        return
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.addHandler(file)
    if rank != 0:
        _keep_libraries_quiet(console, file)


def _keep_libraries_quiet(*handlers: logging.Handler) -> None:
    """Send what libraries report to these handlers: their warnings come from every rank alike.

    torch's C++ code reads a variable when it is loaded.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.captureWarnings(True)
    logging.getLogger().handlers[:] = handlers
    for name in _LIBRARIES:
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True


def _end_last_line(path: Path) -> None:
    """End the last line of an earlier start, which a power loss may have torn, so that it swallows nothing."""
    with path.open("a+b") as file:
        if end := file.seek(0, os.SEEK_END):
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.write(b"\n")


class _RankFile(logging.FileHandler):
    """A log file that reports a full disk once, where `logging` would print a traceback for every line."""

    _has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # a name of logging's
        """Report on the console that lines are lost; that record comes back here, and is dropped."""
        if not self._has_failed:
            self._has_failed = True
            logging.getLogger(_ROOT).warning("%s: log lines are lost: %s", self.baseFilename, sys.exc_info()[1])


class _ConsoleHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to the current sys.stderr: a progress bar puts itself there and keeps lines above it."""

    @property
    def stream(self) -> TextIO:
        """The current standard error."""
        return sys.stderr

    @stream.setter
    def stream(self, value: object) -> None:
        """Ignored; the base class sets a stream once and for all."""


def format_seconds(seconds: float) -> str:
    """A duration for people: 42s, 3m05s, 2h07m, 4d03h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def format_count(number: float) -> str:
    """A count for people: 950, 12.3k, 4.56M, 1.20G."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.0f}"


class Eta:
    """Time left, from the pace since this process began its work (monotonic clock)."""

    def __init__(self, done: int, total: int) -> None:
        self._first, self._total, self._start = done, total, time.monotonic()

    def remaining(self, done: int) -> float:
        """Seconds until `total`, assuming the pace so far."""
        worked = done - self._first
        if worked <= 0:
            return float("inf")
        return (time.monotonic() - self._start) / worked * (self._total - done)


@contextmanager
def progress_bar(description: str, done: int, total: int, *, is_shown: bool) -> Iterator[ProgressLine]:
    """A rich progress bar on a terminal; nothing if the output is a file (log lines carry the ETA there)."""
    if not (is_shown and sys.stderr.isatty()):
        yield ProgressLine(None, None)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield ProgressLine(progress, progress.add_task(description, total=total, completed=done))


class ProgressLine:
    """The interface of a progress bar that may not exist."""

    def __init__(self, progress: object, task: object) -> None:
        self._progress, self._task = progress, task

    def update(self, done: int) -> None:
        """Show that `done` units are done."""
        if self._progress is not None:
            self._progress.update(self._task, completed=done)  # type: ignore[attr-defined]
