"""Starts the ranks of this machine with torch's elastic agent, hands signals on to them, and gives their exit code.

The agent starts processes and tells them their places, as in torchrun; restarts it leaves to job scripts. What it would
do with the end of a rank is done before it looks: it would ask the others to stop, who would announce a save.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from pretrain.errors import LAUNCH_FOLDER, TacoError
from pretrain.launcher.rank_ends import RankEnds
from pretrain.launcher.rank_side import LAUNCHER_PROCESS
from pretrain.parallel.nodes import Nodes
from pretrain.resilience.stop_request import (
    ANNOUNCED,
    ECHO_SECONDS,
    EXIT_PREEMPTED,
    announcement,
    heard_signals,
    say,
)
from pretrain.runlog import get_logger

if TYPE_CHECKING:
    from pretrain.launcher.elastic import RankAgent

_WAKE_SECONDS = 1.0

log = get_logger(__name__)


class StoppedBeforeRanksError(TacoError):
    """A signal arrived before any rank had been started."""

    exit_code = EXIT_PREEMPTED


def launch_ranks(num_processes: int, nodes: Nodes, arguments: Sequence[str], timeout: timedelta) -> int:
    """Run `python -m pretrain.train ARGUMENTS` as `num_processes` ranks on this machine; the exit code of the whole.

    75 if they were stopped by a signal and have saved, 2 for a configuration that cannot work, 124 for a hang, and else
    that of the rank that failed first, whose reason is printed.

    Args:
        timeout: how long nodes wait for each other.

    Raises:
        StoppedBeforeRanksError: by a signal.
        MeetingError: not all nodes have come.
    """
    folder = Path(tempfile.mkdtemp(prefix="taco-launch-"))
    try:
        with _environment_of_ranks(folder, num_processes):
            return _Launch(folder, num_processes, nodes, arguments, timeout).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _environment_of_ranks(folder: Path, num_processes: int) -> Iterator[None]:
    """Ranks inherit this process's variables; the agent adds their places."""
    added = {LAUNCH_FOLDER: str(folder), LAUNCHER_PROCESS: str(os.getpid())}
    # Ranks run this very package, from wherever it was started.
    root = str(Path(__file__).resolve().parents[2])
    added["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    if not os.environ.get("OMP_NUM_THREADS"):
        threads = max(1, len(os.sched_getaffinity(0)) // num_processes)
        added["OMP_NUM_THREADS"] = str(threads)
        log.info("%d processes; threads of each: %d (set OMP_NUM_THREADS to change it)", num_processes, threads)
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _Launch:
    """One launch, from the first rank to the last one's end."""

    def __init__(
        self, folder: Path, num_processes: int, nodes: Nodes, arguments: Sequence[str], timeout: timedelta
    ) -> None:
        self._folder, self._nodes, self._timeout = folder, nodes, timeout
        self._num_processes = num_processes
        self._command = ["-P", "-m", "pretrain.train", *arguments]
        self._ends = RankEnds(folder)
        self._agent: RankAgent | None = None
        self._asked: signal.Signals | None = None
        self._since = 0.0
        self._insisted: int | None = None
        self._is_over = False
        self._error: BaseException | None = None

    def run(self) -> int:
        """Start the ranks and wait for them."""
        before = {number: signal.signal(number, self._hand_on) for number in heard_signals()}
        try:
            # The agent runs beside this thread: here only signals are heard, and it need not know of them.
            thread = threading.Thread(target=self._run_agent, name="taco-agent", daemon=True)
            thread.start()
            while thread.is_alive():
                thread.join(_WAKE_SECONDS)
        finally:
            self._is_over = True
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._error is not None:
            raise self._error
        assert self._agent is not None
        handed_on = {int(signal.SIGTERM)} if self._asked is not None else set()
        code, reason = self._ends.verdict(self._agent.processes, handed_on)
        if reason is not None:
            with contextlib.suppress(OSError):
                print(reason, file=sys.stderr)
        if self._insisted is not None and code == 128 + signal.SIGTERM:
            return 128 + self._insisted  # the ranks know it as SIGTERM
        return code

    def _run_agent(self) -> None:
        try:
            from pretrain.launcher.elastic import start_agent

            self._agent = start_agent(
                self._command, self._num_processes, self._nodes, self._ends, self._folder, self._timeout
            )
            self._agent.run()
        except BaseException as error:  # noqa: BLE001  # raised in the main thread
            self._error = error

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        """Give the ranks a signal that this process got. They are in sessions of their own: a terminal's is none."""
        if self._is_over:
            return
        name = signal.Signals(number).name
        processes = self._agent.processes if self._agent is not None else {}
        if not processes:
            raise StoppedBeforeRanksError(f"stopped by {name} before any rank had begun")
        if self._asked is None:
            self._asked = signal.Signals(number)
            with contextlib.suppress(OSError):
                (self._folder / ANNOUNCED).write_text(name, encoding="ascii")
            self._since = time.monotonic()
            say(announcement(name))
        elif time.monotonic() - self._since > ECHO_SECONDS:
            self._insisted = number
            say(f"{name} again: the ranks stop at once, without saving")
        for process in self._ends.running(processes):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)
