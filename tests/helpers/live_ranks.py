"""Ranks of `taco train` that run while a test does something to them from outside: signals, limits, full disks.

Forked after the heavy imports, as in `forked.py`, and otherwise what a launcher starts: the program's own exit codes,
its own messages, each rank's in a file.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from forked import free_port

from pretrain.checkpoint import CheckpointManifest, find_checkpoint
from pretrain.cli import run_program
from pretrain.metrics import METRICS_FILE, read_metrics
from pretrain.train import app

POLL_SECONDS = 0.002


class LiveRanks:
    """Running processes in the order of their ranks; `run` is the run's folder, `logs` holds what each rank prints."""

    def __init__(self, pids: list[int], run: Path, logs: Path) -> None:
        self.pids = pids
        self.run = run
        self._logs = logs
        self._codes: dict[int, int] = {}
        self._start = time.monotonic()
        self._size = file.stat().st_size if (file := run / METRICS_FILE).exists() else 0

    def wait_for_step(self, step: int, timeout: float = 60) -> float:
        """Wait until a record of `step` or a later one is there; seconds since the start."""
        self.wait_until(lambda: last_step(self.run) >= step, timeout)
        return time.monotonic() - self._start

    def wait_for_new_record(self, timeout: float = 60) -> float:
        """Wait until a step has been written since the start; seconds that it took."""
        file = self.run / METRICS_FILE
        self.wait_until(lambda: file.exists() and file.stat().st_size > self._size, timeout)
        return time.monotonic() - self._start

    def wait_until(self, is_so: Callable[[], object], timeout: float = 60) -> None:
        """Look again and again until `is_so`."""
        end = time.monotonic() + timeout
        while not is_so():
            assert self.is_running(), self.output()
            assert time.monotonic() < end, self.output()
            time.sleep(POLL_SECONDS)

    def is_running(self) -> bool:
        """Whether any rank is alive."""
        self._reap()
        return len(self._codes) < len(self.pids)

    def code(self, rank: int) -> int | None:
        """The exit code of a rank; None while it runs."""
        self._reap()
        return self._codes.get(self.pids[rank])

    def wait(self, timeout: float = 60) -> list[int]:
        """Exit codes in the order of ranks, negative where a signal ended one."""
        end = time.monotonic() + timeout
        while self.is_running():
            assert time.monotonic() < end, f"ranks still run after {timeout:.0f} s:\n{self.output()}"
            time.sleep(POLL_SECONDS)
        return [self._codes[pid] for pid in self.pids]

    def send(self, number: signal.Signals, *ranks: int) -> None:
        """Send a signal to `ranks`, or to all."""
        for rank in ranks or range(len(self.pids)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[rank], number)

    def kill(self) -> None:
        """End whatever still runs."""
        self.send(signal.SIGKILL)
        self.send(signal.SIGCONT)
        self.wait(10)

    def output(self, rank: int | None = None) -> str:
        """What a rank, or every rank, has printed."""
        ranks = range(len(self.pids)) if rank is None else [rank]
        return "\n".join((self._logs / f"log{number}").read_text(errors="replace") for number in ranks)

    def errors(self, rank: int) -> list[str]:
        """The lines in which a rank says why it ended; no tracebacks are taken."""
        text = self.output(rank)
        assert "Traceback" not in text, text
        return [line for line in text.splitlines() if "error: " in line]

    def _reap(self) -> None:
        for pid in self.pids:
            if pid not in self._codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self._codes[pid] = os.waitstatus_to_exitcode(status)


@contextmanager
def live_ranks(
    world_size: int,
    config: Path,
    *arguments: str,
    before: Callable[[int], None] | None = None,
    port: int | None = None,
) -> Iterator[LiveRanks]:
    """`taco train --config CONFIG ARGUMENTS` as `world_size` processes; `before(rank)` runs first in each of them.

    They meet at `port` of this machine, or at a free one.
    """
    logs = config.parent / "output"
    logs.mkdir(exist_ok=True)
    port = free_port() if port is None else port
    words = ["--config", str(config), *arguments]
    pids = [_fork(rank, world_size, port, logs, words, before) for rank in range(world_size)]
    ranks = LiveRanks(pids, config.parent / "run", logs)
    try:
        yield ranks
    finally:
        ranks.kill()


def _fork(
    rank: int, world_size: int, port: int, logs: Path, words: list[str], before: Callable[[int], None] | None
) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code: object = 1
    try:
        log = os.open(logs / f"log{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # not what pytest has put there
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        if before is not None:
            before(rank)
        run_program(app, words)
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001  # as the interpreter would print it
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def run_training(arguments: list[str]) -> tuple[object, str]:
    """`taco train ARGUMENTS` in this process, for `run_ranks`: its exit code, None if it just ended, and errors."""
    errors = io.StringIO()
    code: object = None
    with contextlib.redirect_stderr(errors):
        try:
            run_program(app, arguments)
        except SystemExit as end:
            code = end.code
    return code, errors.getvalue()


def last_step(run: Path) -> int:
    """The step of the last training record of a run; 0 without any."""
    return max((record["step"] for record in read_metrics(run)[-20:] if "loss" in record), default=0)


def state_of(run: Path, step: int) -> dict[str, str]:
    """Hashes of every state file of the newest checkpoint, which must be of `step`: weights, optimizer, counters."""
    manifest = CheckpointManifest.load(find_checkpoint(run))
    assert manifest.step == step
    return {record.name: record.xxh3_128 for record in manifest.files if record.name.startswith("state/")}
