"""Signals: a request to stop becomes a flag, and the run ends at the next step boundary with everything saved."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

from pretrain.errors import TacoError
from pretrain.runlog import get_logger

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
EXIT_PREEMPTED = 75

log = get_logger(__name__)


class PreemptedError(TacoError):
    """The run was asked to stop, has saved, and continues when the same command is given again."""

    exit_code = EXIT_PREEMPTED


class NonFiniteLossError(TacoError):
    """The loss is NaN or infinite; what is on the disk is still good."""


# A terminal and a scheduler signal every process of a job, and a launcher forwards what it got: one wish, heard twice.
ECHO_SECONDS = 5.0


class StopRequest:
    """Turns the first signal into `is_set`; another one, later than an echo of it, ends the process at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._since = 0.0

    @property
    def is_set(self) -> bool:
        """True after a signal has arrived."""
        return self.signal_name is not None

    def install(self) -> None:
        """Take over the stop signals of this process (main thread only)."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.is_set:
            if time.monotonic() - self._since > ECHO_SECONDS:
                os._exit(128 + number)
            return
        self._since = time.monotonic()
        self.signal_name = signal.Signals(number).name
        log.warning(
            "%s: will save at the end of this step and stop; after that, once more stops at once", self.signal_name
        )
