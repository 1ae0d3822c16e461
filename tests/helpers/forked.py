"""Several gloo processes inside a test: forked after the heavy imports, so a case costs a second instead of ten.

One file per result and log; the first rank that fails ends the others, and its traceback is what the test shows.
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

# DeepSpeed and torch import these when an engine is built: 1,500 modules, three seconds in every forked rank otherwise.
import deepspeed.utils.zero_to_fp32  # noqa: F401
import torch._dynamo
import torch._inductor.compile_fx  # noqa: F401


class RankFailedError(AssertionError):
    """A forked rank raised or died; carries its traceback or the end of its log."""


def run_ranks(
    world_size: int, work: Callable[..., Any], *args: Any, timeout: float = 120.0, **kwargs: Any
) -> list[Any]:
    """`work(*args, **kwargs)` in `world_size` forked processes with torchrun's variables set; results in rank order.

    Raises:
        RankFailedError: a rank raised, died or did not end within `timeout` seconds.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = {_fork(rank, world_size, port, folder, work, args, kwargs) for rank in range(world_size)}
        _wait(processes, timeout)
        return [_result(folder, rank) for rank in range(world_size)]


class Ranks:
    """Forked processes that a test may stop and kill, as long as they run; processes and logs in rank order."""

    def __init__(self, processes: list[int], folder: Path) -> None:
        self.processes = processes
        self._folder = folder
        self._codes: dict[int, int] = {}

    def log(self, rank: int) -> str:
        """What the rank has printed so far."""
        return (self._folder / f"log{rank}").read_text(errors="replace")

    def wait(self, timeout: float, ranks: list[int] | None = None) -> list[int]:
        """Exit codes (negative: signals) of these ranks, or of all, once they have ended.

        Raises:
            RankFailedError: a rank runs for longer than `timeout` seconds.
        """
        end = time.monotonic() + timeout
        wanted = list(range(len(self.processes))) if ranks is None else ranks
        while left := [rank for rank in wanted if rank not in self._codes]:
            for rank in left:
                process, status = os.waitpid(self.processes[rank], os.WNOHANG)
                if process:
                    self._codes[rank] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > end:
                logs = "\n".join(f"-- rank {rank}\n{self.log(rank)[-2000:]}" for rank in wanted)
                raise RankFailedError(f"ranks {left} still run after {timeout} s; exit codes {self._codes}\n{logs}")
            time.sleep(0.01)
        return [self._codes[rank] for rank in wanted]

    def kill(self) -> None:
        """End what still runs."""
        for rank, process in enumerate(self.processes):
            if rank not in self._codes:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)


@contextlib.contextmanager
def started_ranks(world_size: int, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[Ranks]:
    """As `run_ranks`, but without waiting: what still runs at the end of the block is killed.

    A rank that raises SystemExit ends with its code.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = Ranks([_fork(rank, world_size, port, folder, work, args, kwargs) for rank in range(world_size)], folder)
        try:
            yield ranks
        finally:
            ranks.kill()


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _fork(rank: int, world_size: int, port: int, folder: Path, work: Callable[..., Any], args: Any, kwargs: Any) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        log = os.open(folder / f"log{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        outcome: tuple[bool, Any] = (True, work(*args, **kwargs))
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
        outcome = (False, traceback.format_exc())
    except BaseException:  # noqa: BLE001  # whatever ends the rank is the test's result
        outcome = (False, traceback.format_exc())
    (folder / f"result{rank}.tmp").write_bytes(pickle.dumps(outcome))
    (folder / f"result{rank}.tmp").rename(folder / f"result{rank}")
    os._exit(status)


def _wait(processes: set[int], timeout: float) -> None:
    end = time.monotonic() + timeout
    while processes and time.monotonic() < end:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process in processes:
            processes.discard(process)
            if status:
                end = min(end, time.monotonic() + 3)  # the others may fail on their own and say why
        elif process == 0:
            time.sleep(0.01)
    for process in processes:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def _result(folder: Path, rank: int) -> Any:
    path = folder / f"result{rank}"
    if not path.exists():
        log = (folder / f"log{rank}").read_text(errors="replace")[-2000:]
        raise RankFailedError(f"rank {rank} died or was killed after the time-out; its log ends with:\n{log}")
    succeeded, value = pickle.loads(path.read_bytes())  # noqa: S301  # written by our own child a moment ago
    if not succeeded:
        raise RankFailedError(f"rank {rank}:\n{value}")
    return value
