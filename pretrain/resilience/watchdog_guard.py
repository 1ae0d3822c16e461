"""The watchdog's second line of defence: a small process beside each rank, for C code that never frees the interpreter.

The watchdog's thread reports through a pipe that it is alive, and how long it may be silent. If nothing comes for that
long, although the rank's process is not stopped, the guard asks the rank for its stacks (SIGQUIT, which is answered in
C) and kills it. The guard ends with the rank, imports only the standard library, and does not count time in which it
was stopped itself.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

_PERIOD = 1.0
_STACK_SECONDS = 2.0


def start(rank: int, stacks: Path) -> subprocess.Popen[bytes] | None:
    """Start the guard of this process; None if the machine has no room for another process."""
    command = [sys.executable, "-S", "-E", __file__, str(os.getpid()), str(rank), str(stacks)]
    try:
        # In its own session: Ctrl-C in the terminal is meant for the rank alone.
        guard = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    except OSError:
        return None
    assert guard.stdin is not None
    os.set_blocking(guard.stdin.fileno(), False)  # a stopped guard must not block the watchdog
    return guard


def tell(guard: subprocess.Popen[bytes], limit: float) -> None:
    """Say that this rank's watchdog is alive, and that it may be silent for `limit` seconds from now on."""
    assert guard.stdin is not None
    with contextlib.suppress(OSError):  # the guard was killed; the watchdog goes on without it
        os.write(guard.stdin.fileno(), f"{limit:.3f}\n".encode())


def stop(guard: subprocess.Popen[bytes]) -> None:
    """End the guard."""
    assert guard.stdin is not None
    with contextlib.suppress(OSError):
        guard.stdin.close()
    guard.kill()  # it may be stopped
    guard.wait()


def guard_process(process: int, rank: str, stacks: str) -> None:
    """Watch `process` until its pipe is closed."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # meant for the rank, but SLURM sends them to all processes of a task
    limit, silent, last = float("inf"), 0.0, time.monotonic()
    while True:
        readable, _, _ = select.select([0], [], [], _PERIOD)
        now = time.monotonic()
        if readable:
            message = os.read(0, 1 << 16)
            if not message:
                return
            limit, silent = float(message.split()[-1]), 0.0
        elif not _is_stopped(process):
            silent += min(now - last, 2 * _PERIOD)
        last = now
        if silent > limit:
            _end(process, rank, stacks, silent)
            return


def _is_stopped(process: int) -> bool:
    """Whether a signal or a debugger holds the process."""
    try:
        with open(f"/proc/{process}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return True  # the process is gone: the pipe closes in a moment


def _end(process: int, rank: str, stacks: str, silent: float) -> None:
    who = "" if rank == "0" else f"[rank {rank}] "
    os.write(
        2,
        f"{who}error: hang: process {process} has not run for {silent:.0f} s, C code keeps its interpreter or a disk "
        f"does not answer; killed, stacks are in {stacks}\n".encode(),
    )
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGQUIT)
        time.sleep(_STACK_SECONDS)
        os.kill(process, signal.SIGKILL)


if __name__ == "__main__":
    guard_process(int(sys.argv[1]), sys.argv[2], sys.argv[3])
