"""Disks that fill up or refuse under a run: the checkpoint before stays, logging never stops training."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_records import FaultRecorder
from live_ranks import LiveRanks, last_step, live_ranks, state_of
from small_runs import write_small_run

from pretrain.checkpoint.manifest import CheckpointManifest, find_problems, list_checkpoints

pytestmark = pytest.mark.slow

STEPS, SAVE_EVERY = 24, 6
RUN: dict[str, Any] = {
    "train__steps": STEPS,
    "train__eval_every": 12,
    "checkpoint": {"every_steps": SAVE_EVERY, "keep": 2},
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The state at the end of a run of two ranks that nobody disturbed."""
    config = write_small_run(tmp_path_factory.mktemp("clean"), **RUN)
    with live_ranks(2, config) as ranks:
        assert ranks.wait() == [0, 0], ranks.output()
    return state_of(ranks.run, STEPS)


def check_kept(run: Path) -> None:
    """The checkpoints of a run that could not save any more: whole, and nothing half beside them."""
    found = list_checkpoints(run / "checkpoints")
    assert found
    assert CheckpointManifest.load(found[0]).step < STEPS
    assert all(find_problems(folder) == [] for folder in found)
    assert [path.name for path in (run / "checkpoints").glob("*.tmp")] == []


def check_refusals(ranks: LiveRanks, *words: str) -> None:
    """Every rank has ended with one line of error."""
    assert ranks.wait() == [1, 1], ranks.output()
    for rank in range(2):
        (line,) = ranks.errors(rank)
        assert all(word in line for word in words), line


@pytest.mark.parametrize("limited", [0, 1])
def test_a_rank_that_cannot_write_ends_all_and_keeps_the_checkpoint_before(
    limited: int, undisturbed: dict[str, str], tmp_path: Path, fault: FaultRecorder
) -> None:
    config = write_small_run(tmp_path, **RUN)
    with live_ranks(2, config) as ranks:
        ranks.wait_until(lambda: list_checkpoints(ranks.run / "checkpoints"))
        resource.prlimit(ranks.pids[limited], resource.RLIMIT_FSIZE, (20_000, 20_000))
        check_refusals(ranks, f"rank {limited}: ", "File too large", "earlier checkpoints are untouched")
    check_kept(ranks.run)
    with live_ranks(2, config) as ranks:
        assert ranks.wait() == [0, 0], ranks.output()
    assert state_of(ranks.run, STEPS) == undisturbed
    fault.record("full-disk", injected=1, survived=1)


def test_a_disk_that_fills_up_under_the_whole_run(
    undisturbed: dict[str, str], tmp_path: Path, disk: Callable[[str], Path], fault: FaultRecorder
) -> None:
    """Records and log lines are lost first, and cost nothing; then a checkpoint cannot be written, and the run ends."""
    config = write_small_run(tmp_path, **RUN, run={"output_dir": str(disk("size=6m") / "run"), "seed": 7})
    with live_ranks(2, config) as ranks:
        ranks.run = tmp_path / "disk" / "run"
        ranks.wait_until(lambda: list_checkpoints(ranks.run / "checkpoints"))
        fill(tmp_path / "disk" / "filler")
        check_refusals(ranks, "No space left on device")
    check_kept(ranks.run)
    (tmp_path / "disk" / "filler").unlink()
    with live_ranks(2, config) as ranks:
        assert ranks.wait() == [0, 0], ranks.output()
    assert state_of(tmp_path / "disk" / "run", STEPS) == undisturbed
    disk("ro")
    with live_ranks(2, config, "train.steps=30", "--allow-change=train.steps") as ranks:
        check_refusals(ranks, "cannot be used", "Read-only file system")
    fault.record("full-disk", injected=2, survived=2)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass


def test_logging_never_stops_training(
    undisturbed: dict[str, str], tmp_path: Path, disk: Callable[[str], Path], fault: FaultRecorder
) -> None:
    """Records and log files on a device that is always full, TensorBoard events on a disk that is."""
    full = disk("size=64k")
    config = write_small_run(tmp_path, **RUN)
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    (run / "run.lock").touch()
    for name in ("metrics.jsonl", "logs/rank_00000.log", "logs/rank_00001.log"):
        (run / name).symlink_to("/dev/full")
    (run / "tensorboard").symlink_to(full / "tensorboard", target_is_directory=True)
    (full / "tensorboard").mkdir()
    with live_ranks(2, config, "run.tensorboard=true") as ranks:
        ranks.wait_until(lambda: any((full / "tensorboard").iterdir()))
        fill(full / "filler")
        assert ranks.wait() == [0, 0], ranks.output()
    assert state_of(run, STEPS) == undisturbed
    assert last_step(run) == 0
    output = ranks.output()
    for words in ("metrics are lost until there is room", "rank_00000.log: log lines are lost", "TensorBoard events"):
        assert output.count(words) == 1, output
    fault.record("logging", injected=3, survived=3)


@pytest.mark.fault("logging")
def test_records_are_written_again_when_there_is_room(tmp_path: Path) -> None:
    config = write_small_run(tmp_path, **RUN)
    with live_ranks(1, config) as ranks:
        ranks.wait_for_step(2)
        (ranks.run / "metrics.jsonl").unlink()
        (ranks.run / "metrics.jsonl").symlink_to("/dev/full")
        ranks.wait_until(lambda: "until there is room" in ranks.output())
        (ranks.run / "metrics.jsonl").unlink()
        assert ranks.wait() == [0], ranks.output()
    assert last_step(ranks.run) == STEPS
