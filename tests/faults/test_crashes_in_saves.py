"""A save that is killed, or loses its power, at every moment: what was saved before is there, whole, and is found."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoint_builders import manifest, write_state
from child_process import fork
from crash_points import LosingDisk, is_below, killed_at, listening
from fault_records import FaultRecorder

from pretrain.checkpoint.manifest import CheckpointManifest, find_problems
from pretrain.checkpoint.store import CheckpointStore
from pretrain.durable import FileRecord, hashing_writer, write_text
from pretrain.run_folder import RunFolder

KEEP = 1  # so that every save also removes one


def open_store(root: Path) -> CheckpointStore:
    """As a new start does."""
    store = CheckpointStore(root, keep=KEEP)
    store.prepare()
    return store


def save(root: Path, step: int) -> None:
    CheckpointStore(root, keep=KEEP).save(manifest(step), write_state)


def check_start(root: Path) -> int:
    """The step that a new start goes on from, after its files have been found whole and nothing else is left."""
    store = open_store(root)
    found = store.newest_good()
    assert found is not None
    assert find_problems(found) == []
    assert [path.name for path in root.iterdir() if path.name.endswith((".tmp", ".bad"))] == []
    return CheckpointManifest.load(found).step


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The checkpoints of a run that has saved step 10."""
    open_store(tmp_path / "checkpoints").save(manifest(10), write_state)
    return tmp_path / "checkpoints"


def copy_of(saved: Path, name: object) -> Path:
    copy = saved.with_name(f"copy-{name}")
    shutil.copytree(saved, copy)
    return copy


@pytest.mark.parametrize("step", [20, 10], ids=["a new step", "the same step again"])
def test_killed_before_every_change_of_the_disk(saved: Path, step: int, fault: FaultRecorder) -> None:
    found: list[int] = []
    for number in itertools.count():
        root = copy_of(saved, number)
        if not killed_at(number, root, lambda root=root: save(root, step)):  # type: ignore[misc]
            break
        found.append(check_start(root))
        save(root, step)
        assert check_start(root) == step
        shutil.rmtree(root)
    assert len(found) > 20
    assert found == sorted(found)  # once the new one is there, it stays
    assert {found[0], found[-1]} == {10, step}
    fault.record("kill-in-save", injected=len(found), survived=len(found))


LARGE = 8 << 20


def write_large_state(folder: Path) -> list[FileRecord]:
    (folder / "state").mkdir()
    content = random.Random(0).randbytes(LARGE)
    with hashing_writer(folder / "state" / "rank-00000.safetensors") as file:
        for start in range(0, LARGE, 1 << 16):
            file.write(content[start : start + (1 << 16)])
    return [FileRecord("state/rank-00000.safetensors", file.num_bytes, file.hexdigest())]


@pytest.mark.slow
def test_killed_from_outside_at_any_time(tmp_path: Path, fault: FaultRecorder) -> None:
    """Another process saves without end; each save that it has told us of must be there after its death."""
    root, told = tmp_path / "checkpoints", tmp_path / "told"
    told.write_text("0")

    def save_without_end() -> None:
        store = open_store(root)
        for step in itertools.count(int(told.read_text()) + 1):
            store.save(manifest(step), write_large_state)
            write_text(told, str(step))  # at once: a kill must not leave it empty

    rng, num_kills = random.Random(3), 12
    for _ in range(num_kills):
        pid = fork(save_without_end)
        time.sleep(rng.uniform(0.02, 0.4))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        last = int(told.read_text())
        if last:
            assert check_start(root) in (last, last + 1)
    fault.record("kill-in-save", injected=num_kills, survived=num_kills)


@pytest.mark.parametrize("again", [False, True], ids=["new steps", "the same step again"])
def test_power_loss_at_every_moment(tmp_path: Path, again: bool, fault: FaultRecorder) -> None:
    """Two saves in a folder that is new; at every fsync and change some of what was not fsynced is gone."""
    disk, run = LosingDisk(tmp_path), tmp_path / "runs" / "run"
    rng = random.Random(11)
    acknowledged = 0
    losses = 0

    def fail(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal losses
        if not is_below(tmp_path, arguments):
            return
        disk.notice(event, arguments)
        for chance in (None, rng):
            left = tmp_path.with_name(f"{tmp_path.name}-left-{losses}")  # outside of what is watched
            disk.lose(left, chance)
            losses += 1
            check_left(left / "runs" / "run" / "checkpoints", acknowledged)
            shutil.rmtree(left)

    with listening(fail):
        RunFolder(run).claim()
        store = open_store(run / "checkpoints")
        for step in (10, 10 if again else 20):
            store.save(manifest(step), write_state)
            acknowledged = step
    assert losses > 100
    fault.record("power-loss", injected=losses, survived=losses)


def check_left(root: Path, acknowledged: int) -> None:
    """What a start after a power loss finds: nothing before the first save, afterwards the last one or a later."""
    found = open_store(root).newest_good()
    assert (0 if found is None else CheckpointManifest.load(found).step) >= acknowledged
