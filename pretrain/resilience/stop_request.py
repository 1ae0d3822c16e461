"""Requests to stop a run, by a signal or a file.

A request becomes a flag, and the run ends at the next step boundary with everything saved.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from types import FrameType

from pretrain.errors import TacoError
from pretrain.runlog import get_logger
from pretrain.step import Action, DoneStep, StepPlan, Watcher

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
EXIT_PREEMPTED = 75

log = get_logger(__name__)


class PreemptedError(TacoError):
    """The run was asked to stop, has saved, and continues when the same command is given again."""

    exit_code = EXIT_PREEMPTED


# A terminal or scheduler signals every process of a job, and a launcher forwards its signals: one request comes twice.
ECHO_SECONDS = 5.0
# Interval between looks for a stop file: a step may take milliseconds, too often for a shared file system.
LOOK_SECONDS = 1.0


class StopRequest(Watcher):
    """Turns the first signal into `is_set`; another one, later than an echo of it, ends the process at once."""

    def __init__(self, rank: int = 0) -> None:
        self.signal_name: str | None = None
        self._who = "" if rank == 0 else f"[rank {rank}] "
        self._is_logged = False
        self._since = 0.0
        self._file: Path | None = None
        self._looked = -LOOK_SECONDS

    def before_step(self, plan: StepPlan) -> None:
        """Pass on to all ranks a request that this one received."""
        plan.requests["stop"] = self.is_set

    def after_step(self, step: DoneStep) -> Action:
        """Stop if any rank was asked to."""
        return Action.STOP if "stop" in step.result.requests else Action.CONTINUE

    @property
    def is_set(self) -> bool:
        """True after a signal has arrived, or while the watched file is there."""
        if self.signal_name is None:
            return self._is_file_there()
        if not self._is_logged:
            self._is_logged = True
            log.info("stopping after %s", self.signal_name)
        return True

    def watch(self, file: Path) -> None:
        """Treat this file, once it exists, as a request to stop; it is enough if one rank watches."""
        self._file = file

    def _is_file_there(self) -> bool:
        if self._file is None or time.monotonic() - self._looked < LOOK_SECONDS:
            return False
        self._looked = time.monotonic()
        if not os.path.exists(self._file):  # never raises: a brief failure of a file system must not stop a run
            return False
        log.warning("%s: exists; will save at the end of this step and stop; remove it to continue later", self._file)
        return True

    def install(self) -> None:
        """Take over the stop signals of this process (main thread only)."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None:
            if time.monotonic() - self._since > ECHO_SECONDS:
                os._exit(128 + number)
            return
        self._since = time.monotonic()
        self.signal_name = signal.Signals(number).name
        # Not through the logger: the signal may interrupt a line that the same thread is writing, and Python's streams
        # would raise a RuntimeError.
        text = f"{self._who}{self.signal_name}: will save at the end of this step and stop; a later signal stops "
        line_end = "\n" if os.isatty(2) else ""  # of a progress bar
        with contextlib.suppress(OSError):
            os.write(2, f"{line_end}{text}at once\n".encode())
