"""How far a program on corpora has come: a bar with ETA on a terminal, a line every few seconds elsewhere.

Everything goes to standard error, so that standard output holds results only.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_SECONDS_BETWEEN_LINES = 5.0


class ProgressMeter:
    """Shows the share of the input files that has been read, with a line of words; use it as a context manager."""

    def __init__(self, title: str, total_bytes: int, done_bytes: int = 0) -> None:
        """`total_bytes`: size of all input files on disk; `done_bytes` of them were read by an earlier run."""
        self._title, self._total, self._done_before = title, max(total_bytes, 1), done_bytes
        self._start = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if sys.stderr.isatty():
            columns = (TextColumn(title), BarColumn(), TextColumn("{task.percentage:3.0f}% {task.fields[words]}"))
            self._bar = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))
            self._task = self._bar.add_task(title, total=self._total, words="", completed=done_bytes)

    def __enter__(self) -> ProgressMeter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def update(self, done_bytes: int, words: str) -> None:
        """`done_bytes` of the input files are read; `words` says what that amounts to."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done_bytes, words=f"{words}, {self._eta(done_bytes)}")
            return
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            share = 100 * min(done_bytes / self._total, 1)
            print(f"{self._title}: {share:.0f} %, {words}, {self._eta(done_bytes)}", file=sys.stderr, flush=True)

    def _eta(self, done_bytes: int) -> str:
        """Time left at the speed of this run, whatever an earlier one had done."""
        fresh = done_bytes - self._done_before
        if fresh <= 0:
            return "ETA unknown"
        seconds = max(self._total - done_bytes, 0) * self.seconds / fresh
        hours, minutes = divmod(round(seconds) // 60, 60)
        return f"ETA {hours} h {minutes:02d} min" if seconds >= 3600 else f"ETA {seconds:.0f} s"
