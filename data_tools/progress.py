"""Progress of the data programs: a bar with ETA on a terminal, a line every few seconds elsewhere.

Everything goes to standard error, so that standard output holds only results.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BETWEEN_LOOKS = 1.0
_BAR_COLUMNS = 20
_PERCENT_COLUMNS = len(" 100% ")


class ProgressMeter:
    """Shows the share of the input that has been read, with further figures; use it as a context manager."""

    def __init__(self, title: str, total_bytes: int, done_bytes: int = 0) -> None:
        """`total_bytes`: size of all input files on disk, 0 if unknown, which leaves out share and ETA; an earlier run
        has read `done_bytes` of them."""
        self._title, self._total, self._done_before = title, total_bytes, done_bytes
        self._start = self._last_line = self._last_update = time.monotonic()
        self._done = done_bytes
        self._words: tuple[str, ...] = ()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._tell_patience, daemon=True)
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
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        if self._bar is not None:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def update(self, done_bytes: int, *words: str) -> None:
        """Reports that `done_bytes` of the input have been read; `words` are further figures, most important first."""
        self._last_update = time.monotonic()
        self._done, self._words = done_bytes, words
        self._show()

    def _show(self) -> None:
        words = (self._eta(self._done), *self._words) if self._total else self._words
        waiting = time.monotonic() - self._last_update
        if waiting >= _SECONDS_BETWEEN_LINES:
            words = (f"at the same place for {format_seconds(waiting)}", *words)
        if self._bar is not None:
            room = self._bar.console.width - len(self._title) - _BAR_COLUMNS - _PERCENT_COLUMNS - 2
            self._bar.update(self._task, completed=self._done, words=_join_what_fits(words, room))
            return
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            share = (f"{100 * min(self._done / self._total, 1):.0f} %",) if self._total else ()
            print(f"{self._title}: {', '.join((*share, *words))}", file=sys.stderr, flush=True)

    def _tell_patience(self) -> None:
        """In a thread: reports again where nothing is done for long, as in a document of a gigabyte."""
        while not self._end.wait(_SECONDS_BETWEEN_LOOKS):
            if time.monotonic() - self._last_update >= _SECONDS_BETWEEN_LINES:
                self._show()

    def _eta(self, done_bytes: int) -> str:
        """Time left at the speed of this run alone."""
        fresh = done_bytes - self._done_before
        if fresh <= 0:
            return "ETA unknown"
        return f"ETA {format_seconds(max(self._total - done_bytes, 0) * self.seconds / fresh)}"


class PatientLine:
    """Says every few seconds that a library, which reports nothing itself, is still at work; a context manager.

    On a terminal a spinner with the seconds so far, elsewhere a line.
    """

    def __init__(self, title: str, words: Callable[[], str]) -> None:
        """`words` tell how far it is; they are asked for in a thread of this class."""
        self._title, self._words = title, words
        self._start = time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._report, daemon=True)

    def __enter__(self) -> PatientLine:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    def _report(self) -> None:
        if not sys.stderr.isatty():
            while not self._end.wait(_SECONDS_BETWEEN_LINES):
                print(self._line(), file=sys.stderr, flush=True)
            return
        with Console(stderr=True).status(self._line()) as status:
            while not self._end.wait(0.5):
                status.update(self._line())

    def _line(self) -> str:
        return f"{self._title}: {self._words()}, {format_seconds(time.monotonic() - self._start)} so far"


class ByteCounter:
    """Adds up the bytes processed in several datasets for one meter."""

    def __init__(self, meter: ProgressMeter) -> None:
        self._meter, self._num_bytes = meter, 0

    def __call__(self, num_bytes: int) -> None:
        """Adds `num_bytes` to the bytes done."""
        self._num_bytes += num_bytes
        speed = self._num_bytes / 1e6 / max(self._meter.seconds, 1e-9)
        self._meter.update(self._num_bytes, f"{speed:,.0f} MB/s", f"{self._num_bytes / 1e9:,.2f} GB")


def format_seconds(seconds: float) -> str:
    """Seconds up to an hour, then hours and minutes."""
    hours, minutes = divmod(round(seconds) // 60, 60)
    return f"{hours} h {minutes:02d} min" if seconds >= 3600 else f"{seconds:.0f} s"


def _join_what_fits(words: tuple[str, ...], room: int) -> str:
    """As many of the first `words` as fit into `room` columns; a rich table would shorten all of them alike."""
    line = words[0] if words else ""
    for word in words[1:]:
        if len(line) + len(word) + 2 > room:
            break
        line += f", {word}"
    return line
