"""Signals: a request to stop becomes a flag, and the run ends at the next step boundary with everything saved."""

from __future__ import annotations

import os
import signal
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


class StopRequest:
    """Turns the first signal into `is_set`; a second one ends the process at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

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
            os._exit(128 + number)
        self.signal_name = signal.Signals(number).name
        log.warning("%s: will save at the end of this step and stop; once more to stop at once", self.signal_name)
