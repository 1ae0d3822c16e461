"""Ranks of `taco train` that run while a test does something to them from outside: signals, limits, full disks.

Forked after the heavy imports, as in `forked.py`, and otherwise what a launcher starts: the program's own exit codes,
its own messages, each rank's in a file.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from forked import Ranks, start_ranks

from pretrain.checkpoint.manifest import CheckpointManifest, find_checkpoint
from pretrain.cli import run_program
from pretrain.metrics import METRICS_FILE, read_metrics
from pretrain.train import app


class LiveRanks(Ranks):
    """Running ranks of `taco train`; `run` is the run's folder."""

    def __init__(self, pids: list[int], run: Path, logs: Path) -> None:
        super().__init__(pids, logs)
        self.run = run
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

    def train(rank: int) -> None:
        if before is not None:
            before(rank)
        run_program(app, ["--config", str(config), *arguments])

    ranks = LiveRanks(start_ranks(world_size, train, logs, port), config.parent / "run", logs)
    try:
        yield ranks
    finally:
        ranks.kill()


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
