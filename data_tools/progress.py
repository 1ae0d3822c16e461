"""Progress of the data programs: a bar with ETA on a terminal, a line every few seconds elsewhere.

Everything goes to standard error, so that standard output holds only results.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

_SECONDS_BETWEEN_LINES = 5.0
_BAR_COLUMNS = 20
_PERCENT_COLUMNS = len(" 100% ")


class ProgressMeter:
    """Shows the share of the input that has been read, with further figures; use it as a context manager."""

    def __init__(self, title: str, total_bytes: int, done_bytes: int = 0) -> None:
        """`total_bytes`: size of all input files on disk, 0 if unknown, which leaves out share and ETA; an earlier run
        has read `done_bytes` of them."""
        self._title, self._total, self._done_before = title, total_bytes, done_bytes
        self._start = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if sys.stderr.isatty():
            share = (TextColumn("{task.percentage:3.0f}%"),) if total_bytes else ()
            columns = (TextColumn(title), BarColumn(_BAR_COLUMNS), *share, TextColumn("{task.fields[words]}"))
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(title, total=total_bytes or None, words="", completed=done_bytes)

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

    def update(self, done_bytes: int, *words: str) -> None:
        """Reports that `done_bytes` of the input have been read; `words` are further figures, most important first."""
        if self._total:
            words = (self._eta(done_bytes), *words)
        if self._bar is not None:
            room = self._bar.console.width - len(self._title) - _BAR_COLUMNS - _PERCENT_COLUMNS - 2
            self._bar.update(self._task, completed=done_bytes, words=_join_what_fits(words, room))
            return
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            share = (f"{100 * min(done_bytes / self._total, 1):.0f} %",) if self._total else ()
            print(f"{self._title}: {', '.join((*share, *words))}", file=sys.stderr, flush=True)

    def _eta(self, done_bytes: int) -> str:
        """Time left at the speed of this run alone."""
        fresh = done_bytes - self._done_before
        if fresh <= 0:
            return "ETA unknown"
        seconds = max(self._total - done_bytes, 0) * self.seconds / fresh
        hours, minutes = divmod(round(seconds) // 60, 60)
        return f"ETA {hours} h {minutes:02d} min" if seconds >= 3600 else f"ETA {seconds:.0f} s"


class ByteCounter:
    """Adds up the bytes processed in several datasets for one meter."""

    def __init__(self, meter: ProgressMeter) -> None:
        self._meter, self._num_bytes = meter, 0

    def __call__(self, num_bytes: int) -> None:
        """Adds `num_bytes` to the bytes done."""
        self._num_bytes += num_bytes
        speed = self._num_bytes / 1e6 / max(self._meter.seconds, 1e-9)
        self._meter.update(self._num_bytes, f"{speed:,.0f} MB/s", f"{self._num_bytes / 1e9:,.2f} GB")


def _join_what_fits(words: tuple[str, ...], room: int) -> str:
    """As many of the first `words` as fit into `room` columns; a rich table would shorten all of them alike."""
    line = words[0] if words else ""
    for word in words[1:]:
        if len(line) + len(word) + 2 > room:
            break
        line += f", {word}"
    return line
