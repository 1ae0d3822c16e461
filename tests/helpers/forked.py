"""Several gloo ranks inside a test: forked after the heavy imports, so that one costs a second instead of ten.

`run_ranks` waits for results: one file per result and log; the first rank that fails ends the others, and its traceback
is what the test shows. `started_ranks` gives running ranks to a test that does something to them from outside.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Ranks import these when an engine is built, and stages of a pipeline in their first backward: once here instead of in
# every fork.
import deepspeed.utils.zero_to_fp32  # noqa: F401
import torch.fx.experimental.symbolic_shapes  # noqa: F401
from child_process import fork

POLL_SECONDS = 0.002
LAST_WORDS_SECONDS = 3.0  # after one rank's failure: the others may fail on their own, and say why


class RankFailedError(AssertionError):
    """A forked rank raised or died; carries its traceback or the end of its log."""


class Ranks:
    """Running processes in the order of their ranks; `logs` holds what each of them prints."""

    def __init__(self, pids: list[int], logs: Path) -> None:
        self.pids = pids
        self._logs = logs
        self._codes: dict[int, int] = {}

    def wait_until(self, is_so: Callable[[], object], timeout: float = 60) -> None:
        """Look again and again until `is_so`.

        Raises:
            RankFailedError: all ranks have ended, or `timeout` seconds have passed.
        """
        end = time.monotonic() + timeout
        while not is_so():
            if not self.is_running():
                raise RankFailedError(f"all ranks have ended, with {self._codes}:\n{self.output()}")
            if time.monotonic() > end:
                raise RankFailedError(f"it is not so after {timeout:.0f} s:\n{self.output()}")
            time.sleep(POLL_SECONDS)

    def is_running(self) -> bool:
        """Whether any rank is alive."""
        return any(self.code(rank) is None for rank in range(len(self.pids)))

    def code(self, rank: int) -> int | None:
        """The exit code of a rank, negative where a signal ended it; None while it runs."""
        pid = self.pids[rank]
        if pid not in self._codes:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self._codes[pid] = os.waitstatus_to_exitcode(status)
        return self._codes.get(pid)

    def wait(self, timeout: float = 60, ranks: list[int] | None = None) -> list[int]:
        """Exit codes of these ranks, or of all, once they have ended.

        Raises:
            RankFailedError: a rank runs for longer than `timeout` seconds.
        """
        end = time.monotonic() + timeout
        wanted = list(range(len(self.pids))) if ranks is None else ranks
        while None in (codes := [self.code(rank) for rank in wanted]):
            if time.monotonic() > end:
                raise RankFailedError(f"ranks still run after {timeout:.0f} s, codes {codes}:\n{self.output()}")
            time.sleep(POLL_SECONDS)
        return [code for code in codes if code is not None]

    def send(self, number: signal.Signals, *ranks: int) -> None:
        """Send a signal to `ranks`, or to all; those that have ended get none."""
        for rank in ranks or range(len(self.pids)):
            if self.code(rank) is None:
                os.kill(self.pids[rank], number)

    def kill(self) -> None:
        """End whatever still runs."""
        self.send(signal.SIGKILL)
        self.wait(10)

    def output(self, rank: int | None = None) -> str:
        """What a rank, or every rank, has printed."""
        ranks = range(len(self.pids)) if rank is None else [rank]
        files = [self._logs / f"log{number}" for number in ranks]
        return "\n".join(file.read_text(errors="replace") for file in files if file.exists())

    def errors(self, rank: int) -> list[str]:
        """The lines in which a rank says why it ended; no tracebacks are taken."""
        text = self.output(rank)
        assert "Traceback" not in text, text
        return [line for line in text.splitlines() if "error: " in line]


def start_ranks(world_size: int, work: Callable[[int], object], logs: Path, port: int | None = None) -> list[int]:
    """`work(rank)` in `world_size` processes with torchrun's variables set; their numbers.

    They meet at `port` of this machine, or at a free one.
    """
    place = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_PORT": port or free_port()}

    def start(rank: int) -> None:
        variables = place | {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({name: str(value) for name, value in variables.items()})
        work(rank)

    return [fork(lambda rank=rank: start(rank), logs / f"log{rank}") for rank in range(world_size)]


@contextlib.contextmanager
def started_ranks(world_size: int, work: Callable[..., object], *args: Any, **kwargs: Any) -> Iterator[Ranks]:
    """`work(*args, **kwargs)` in `world_size` processes; what still runs at the end of the block is killed."""
    with tempfile.TemporaryDirectory() as name:
        logs = Path(name)
        ranks = Ranks(start_ranks(world_size, lambda _: work(*args, **kwargs), logs), logs)
        try:
            yield ranks
        finally:
            ranks.kill()


def run_ranks(
    world_size: int, work: Callable[..., Any], *args: Any, timeout: float = 120.0, **kwargs: Any
) -> list[Any]:
    """`work(*args, **kwargs)` in `world_size` processes with torchrun's variables set; results in rank order.

    Raises:
        RankFailedError: a rank raised, died or did not end within `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def keep_result(rank: int) -> None:
            try:
                outcome: tuple[bool, Any] = (True, work(*args, **kwargs))
            except BaseException:  # noqa: BLE001  # whatever ends the rank is the test's result
                outcome = (False, traceback.format_exc())
            (folder / f"unfinished{rank}").write_bytes(pickle.dumps(outcome))
            (folder / f"unfinished{rank}").rename(folder / f"result{rank}")
            sys.exit(0 if outcome[0] else 1)

        ranks = Ranks(start_ranks(world_size, keep_result, folder), folder)
        try:
            _wait_for_all(ranks, timeout)
        finally:
            ranks.kill()
        return [_result(folder, ranks, rank) for rank in range(world_size)]


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_all(ranks: Ranks, timeout: float) -> None:
    end = time.monotonic() + timeout
    failed = False
    while ranks.is_running() and time.monotonic() < end:
        if not failed and any(ranks.code(rank) for rank in range(len(ranks.pids))):
            failed, end = True, min(end, time.monotonic() + LAST_WORDS_SECONDS)
        time.sleep(POLL_SECONDS)


def _result(folder: Path, ranks: Ranks, rank: int) -> Any:
    path = folder / f"result{rank}"
    if not path.exists():
        log = ranks.output(rank)[-2000:]
        raise RankFailedError(f"rank {rank} died or was killed after the time-out; its log ends with:\n{log}")
    succeeded, value = pickle.loads(path.read_bytes())  # noqa: S301  # written by our own child a moment ago
    if not succeeded:
        raise RankFailedError(f"rank {rank}:\n{value}")
    return value
