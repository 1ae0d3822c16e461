"""`taco train --processes N` from outside: signals, exit codes, what people read, and ranks without a launcher."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from live_ranks import last_step
from small_runs import write_small_run

from pretrain.checkpoint.manifest import CheckpointManifest, find_checkpoint
from pretrain.cli import main

STEPS = 3000
START_SECONDS = 120.0


class Launched:
    """A launcher of two ranks; its output in a file."""

    def __init__(self, config: Path, *arguments: str) -> None:
        self.run = config.parent / "run"
        self._log = config.parent / f"output{time.monotonic_ns()}"
        variables = {
            name: text for name, text in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        }
        variables["TMPDIR"] = str(config.parent)  # a launcher that is killed cannot remove its folder
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pretrain.train", "--config", str(config), "--processes", "2", *arguments],
                stdout=log,
                stderr=log,
                env=variables,
            )

    def ranks(self) -> list[psutil.Process]:
        """Its two ranks in order, as soon as they are there."""
        self.wait_until(lambda: len(psutil.Process(self.process.pid).children()) == 2)
        return psutil.Process(self.process.pid).children()

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: last_step(self.run) >= step)

    def wait_until(self, is_so) -> None:  # type: ignore[no-untyped-def]
        end = time.monotonic() + START_SECONDS
        while not is_so():
            assert time.monotonic() < end, self.output()
            assert self.process.poll() is None, self.output()
            time.sleep(0.02)

    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def end(self) -> int:
        return self.process.wait(START_SECONDS)


def saved(run: Path) -> int:
    return CheckpointManifest.load(find_checkpoint(run)).step


@pytest.mark.slow
@pytest.mark.fault("stop-signal")
@pytest.mark.usefixtures("hangup_is_heard")
def test_a_run_of_two_ranks_under_signals_and_kills(tmp_path: Path) -> None:
    """One run, started again after each fault: every start costs the imports of two ranks."""
    changes = {"train__steps": STEPS, "train__eval_every": STEPS, "checkpoint": {"every_steps": STEPS}}
    config = write_small_run(tmp_path, **changes)

    launched = Launched(config)
    launched.wait_for_step(5)
    ranks = launched.ranks()
    launched.process.kill()
    launched.end()
    _, alive = psutil.wait_procs(ranks, timeout=30)
    assert alive == [], "ranks without a launcher go on"
    first = saved(tmp_path / "run")
    assert first >= 5

    launched = Launched(config)
    launched.wait_for_step(first + 5)
    launched.process.send_signal(signal.SIGHUP)
    assert launched.end() == 75, launched.output()
    text = launched.output()
    assert text.count("SIGHUP: will save at the end of this step") == 1
    assert text.count("stopping after SIGHUP") == 1
    assert re.search(r"stopped at step \d+ of \d+ as asked; everything is saved", text.splitlines()[-1])
    assert "Traceback" not in text
    second = saved(tmp_path / "run")
    assert second >= first + 5

    launched = Launched(config)
    launched.wait_for_step(second + 1)
    launched.ranks()[1].kill()
    assert launched.end() == 128 + signal.SIGKILL
    text = launched.output()
    assert "error: rank 1 (process" in text.splitlines()[-1]
    assert text.count("error: ") == 1
    assert "Traceback" not in text
    assert "lost contact" not in text


@pytest.mark.slow
def test_an_error_of_all_ranks_is_read_once(tmp_path: Path) -> None:
    config = write_small_run(tmp_path)
    (tmp_path / "train.bin").write_bytes(b"")
    launched = Launched(config)
    assert launched.end() == 1
    text = launched.output()
    assert text.count("error: ") == 1
    assert "train.bin" in text
    assert "Traceback" not in text


def test_data_that_is_not_here_is_named_before_any_rank_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write_small_run(tmp_path, train__global_batch_size=16))
    with pytest.raises(SystemExit) as end:
        main(["train", "--config", config, "--processes", "2", f"data.train=[{tmp_path / 'absent'}]"])
    assert end.value.code == 1
    message = capsys.readouterr().err
    assert "absent.bin .idx .json: no such file" in message
    assert "starting" not in message


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["train", *arguments])
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.fault("bad-config")
def test_the_configuration_is_checked_once_before_any_rank_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    config = ("--config", str(write_small_run(tmp_path)))
    message = refused(capsys, *config, "--processes", "3")
    assert message.count("error: ") == 1
    assert "(3)" in message
    assert "--nodes 2 goes with --processes" in refused(capsys, *config, "--nodes", "2")
    assert "set NODE_RANK" in refused(capsys, *config, "--nodes", "2", "--processes", "2")
    monkeypatch.setenv("RANK", "0")
    assert "rank 0 already" in refused(capsys, *config, "--processes", "2")
