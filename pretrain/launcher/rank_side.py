"""What a rank does because `taco train --processes` has started it: it ends with its launcher, and tells it why."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from types import TracebackType

from pretrain.errors import TacoError, leave_reason

LAUNCHER_PROCESS = "TACO_LAUNCHER_PROCESS"
_PR_SET_PDEATHSIG = 1


class NoLauncherError(TacoError):
    """The launcher has ended before this rank had begun."""


def join_launcher() -> None:
    """Tie this process to the launcher that has started it; does nothing in a process that has none.

    If the launcher is killed, the system sends SIGTERM here: the ranks save, and end.

    Raises:
        NoLauncherError: it is gone already.
    """
    launcher = os.environ.pop(LAUNCHER_PROCESS, None)  # not for what this process starts itself
    if launcher is None:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != int(launcher):
        raise NoLauncherError(f"the launcher of this rank, process {launcher}, has ended")
    sys.excepthook = _leave_traceback


def _leave_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Instead of printing it: the launcher shows the one of the rank that failed first."""
    text = "".join(traceback.format_exception(kind, error, trace)).rstrip("\n")
    if not leave_reason(text):
        sys.__excepthook__(kind, error, trace)
