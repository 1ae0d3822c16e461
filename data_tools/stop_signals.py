"""Turns SIGTERM, SIGHUP and Ctrl-C into a request to stop at the next safe point, so that finished work can be kept."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from pretrain.errors import TacoError


class StoppedError(TacoError):
    """The run was asked to stop: exit code 130 for Ctrl-C, 75 for a job's time limit (SIGTERM) or a closed terminal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 130 if number == signal.SIGINT else 75


class StopSignals:
    """Records the first signal for `check`; a second one ends the process at once. Use it as a context manager."""

    def __init__(self) -> None:
        self._number = 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                    continue  # nohup: the end of the terminal is not the end of the program
                self._old[number] = signal.signal(number, self._record)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def check(self) -> None:
        """Raises StoppedError: a signal has arrived."""
        if self._number:
            raise StoppedError(self._number)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self._number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old.clear()
