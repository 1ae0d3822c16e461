"""Requests to stop a run, by a signal or a file.

A request becomes a flag, and the run ends at the next step boundary with everything
saved.
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


# A terminal and a scheduler signal every process of a job, and a launcher forwards what it got: one wish, heard twice.
ECHO_SECONDS = 5.0
# How often a stop file is looked for: a step may take milliseconds, a shared file system does not like that.
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
        """Let all ranks hear of a request that this one got."""
        plan.requests["stop"] = self.is_set

    def after_step(self, step: DoneStep) -> Action:
        """Stop where any rank was asked to."""
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
        """Take this file, as soon as somebody makes it, for a request to stop; one rank is enough for all."""
        self._file = file

    def _is_file_there(self) -> bool:
        if self._file is None or time.monotonic() - self._looked < LOOK_SECONDS:
            return False
        self._looked = time.monotonic()
        if not os.path.exists(self._file):  # never raises: a file system that fails for a moment stops no run
            return False
        log.warning("%s: is there; will save at the end of this step and stop; remove it to go on later", self._file)
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
        # Not by the logger: the signal may have come while the same thread writes a line of its own, which Python's
        # streams answer with a RuntimeError.
        text = (
            f"{self._who}{self.signal_name}: will save at the end of this step and stop; after that, once more stops "
        )
        line_end = "\n" if os.isatty(2) else ""  # of a progress bar
        with contextlib.suppress(OSError):
            os.write(2, f"{line_end}{text}at once\n".encode())
