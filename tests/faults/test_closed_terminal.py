"""A terminal that is closed under a run: SIGHUP, and nothing can be written to standard error any more."""

from __future__ import annotations

import fcntl
import os
import sys
import termios
import threading
from pathlib import Path

import pytest
from child_process import fork
from live_ranks import LiveRanks
from small_runs import write_small_run

from pretrain.checkpoint.manifest import CheckpointManifest, find_checkpoint
from pretrain.cli import run_program
from pretrain.train import app

pytestmark = pytest.mark.slow


@pytest.mark.fault("stop-signal")
@pytest.mark.usefixtures("hangup_is_heard")
def test_a_closed_terminal_stops_a_run_that_has_saved(tmp_path: Path) -> None:
    """With a progress bar, which goes on to write where nothing can be written."""
    config = write_small_run(tmp_path, train__steps=100_000, train__eval_every=100_000, checkpoint__every_steps=100_000)
    ours, terminal = os.openpty()

    def train() -> None:
        os.close(ours)
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        for descriptor in (0, 1, 2):
            os.dup2(terminal, descriptor)
        sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            os.environ.pop(name, None)
        run_program(app, ["--config", str(config)])

    ranks = LiveRanks([fork(train)], tmp_path / "run", tmp_path)
    os.close(terminal)
    shown: list[bytes] = []

    def read() -> None:
        while True:
            try:
                shown.append(os.read(ours, 1 << 16))
            except OSError:
                return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        ranks.wait_for_step(5)
        assert b"training" in b"".join(shown)
        os.close(ours)
        assert ranks.wait(60) == [75]
    finally:
        ranks.kill()
    assert CheckpointManifest.load(find_checkpoint(tmp_path / "run")).step >= 5
    assert "stopping after SIGHUP" in (tmp_path / "run" / "logs" / "rank_00000.log").read_text()
