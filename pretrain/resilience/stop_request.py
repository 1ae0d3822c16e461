"""Requests to stop a run, by a signal or a file.

A request becomes a flag, and the run ends at the next step boundary with everything saved. A thread of its own hears
the signals: Python's handlers run in the main thread only, which may be in C++ for as long as another rank pleases.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

from pretrain.errors import LAUNCH_FOLDER, TacoError, leave_reason
from pretrain.runlog import get_logger
from pretrain.step import Action, DoneStep, StepPlan, Watcher

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
EXIT_PREEMPTED = 75
# In the launcher's folder: the name of a signal that it has announced already, and hands on to its ranks as SIGTERM.
ANNOUNCED = "signal"
NOTHING_TO_SAVE = "stopped before the first step; there is nothing to save"

log = get_logger(__name__)


class PreemptedError(TacoError):
    """The run was asked to stop, has saved, and continues when the same command is given again."""

    exit_code = EXIT_PREEMPTED


# A terminal or scheduler signals every process of a job, and a launcher forwards its signals: one request comes twice.
ECHO_SECONDS = 5.0
# Interval between looks for a stop file: a step may take milliseconds, too often for a shared file system.
LOOK_SECONDS = 1.0


def heard_signals() -> list[signal.Signals]:
    """The signals that stop a run. SIGHUP is left out if it was ignored from the start: that is what nohup asks for."""
    return [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]


def announcement(name: str) -> str:
    """What people read when a first signal has arrived."""
    later = f"{ECHO_SECONDS:.0f} s or more later"
    return f"{name}: will save at the end of this step and stop; another signal, {later}, stops at once"


def say(text: str) -> None:
    """Write a line to standard error, below a progress bar if there is one; a terminal that is gone is no error.

    Not through the logger: whoever is interrupted may hold its lock, or be in the middle of a line of Python's stream.
    """
    line_end = "\n" if os.isatty(2) else ""
    with contextlib.suppress(OSError):
        os.write(2, f"{line_end}{text}\n".encode())


class StopRequest(Watcher):
    """Turns the first signal into `is_set`; another one, later than an echo of it, ends the process at once.

    Before `connected` there is nothing to save, and others may never come: the first signal ends the process then.
    """

    def __init__(self, rank: int = 0) -> None:
        self.signal_name: str | None = None
        self._who = "" if rank == 0 else f"[rank {rank}] "
        self._is_logged = False
        self._is_connected = False
        self._since: float | None = None
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

    def connected(self) -> None:
        """All ranks have met: from now on a signal is a request on which they agree."""
        self._is_connected = True

    def install(self) -> None:
        """Take over the stop signals of this process (main thread only)."""
        # The interpreter's C code writes the number of every signal here, whatever the main thread does.
        heard, written = os.pipe()
        os.set_blocking(written, False)
        signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(heard,), name="taco-signals", daemon=True).start()
        for number in heard_signals():
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """In the main thread: the flag is set before its next instruction. The other thread does the rest."""
        if self.signal_name is None:
            self.signal_name = _announced() or signal.Signals(number).name

    def _listen(self, heard: int) -> None:
        while numbers := os.read(heard, 64):
            for number in numbers:
                if number in STOP_SIGNALS:
                    self._hear(number)

    def _hear(self, number: int) -> None:
        announced, now = _announced(), time.monotonic()
        name = announced or signal.Signals(number).name
        if self._since is None:
            self._since = now
            self.signal_name = self.signal_name or name
            if not self._is_connected:
                if announced is None or not leave_reason(NOTHING_TO_SAVE):
                    say(f"{self._who}{name}: {NOTHING_TO_SAVE}")
                os._exit(EXIT_PREEMPTED)
            if announced is None:
                say(self._who + announcement(name))
        elif now - self._since > ECHO_SECONDS:
            if announced is None:
                say(f"{self._who}{name} again: stops at once, without saving")
            os._exit(128 + number)


def _announced() -> str | None:
    """The name of the signal that the launcher of this rank has announced; None without one."""
    folder = os.environ.get(LAUNCH_FOLDER)
    if not folder:
        return None
    with contextlib.suppress(OSError):
        return (Path(folder) / ANNOUNCED).read_text(encoding="ascii") or None
    return None
