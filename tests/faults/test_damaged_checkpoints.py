"""Checkpoints of a real run, damaged in every file: found before they are loaded, and all ranks agree what to do."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_builders import is_unchanged
from fault_records import FaultRecorder
from live_ranks import live_ranks, state_of
from small_runs import write_small_run

from pretrain.checkpoint.manifest import find_problems, list_checkpoints
from pretrain.metrics import read_metrics

pytestmark = pytest.mark.slow

STEPS = 6


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two ranks with checkpoints of steps 3 and 6, and of its configuration and data."""
    folder = tmp_path_factory.mktemp("trained")
    with live_ranks(2, write_small_run(folder, train__steps=STEPS, checkpoint={"every_steps": 3})) as ranks:
        assert ranks.wait() == [0, 0], ranks.output()
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of its run, with a configuration beside it."""
    shutil.copytree(trained / "run", tmp_path / "run")
    config = (trained / "run.yaml").read_text().replace(f"output_dir: {trained}", f"output_dir: {tmp_path}")
    (tmp_path / "run.yaml").write_text(config)
    return tmp_path / "run"


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def flip(content: bytes, rng: random.Random) -> bytes:
    place, changed = rng.randrange(len(content)), bytearray(content)
    changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "emptied": lambda content, rng: b"",
    "cut": lambda content, rng: content[:-1],
    "cut anywhere": lambda content, rng: content[: rng.randrange(len(content))],
    "longer": lambda content, rng: content + b"\0",
    "a bit": flip,
    "another bit": flip,
    "zeros": lambda content, rng: bytes(len(content)),
}


def check_found(checkpoint: Path, path: Path, damaged: bytes) -> None:
    """Put `damaged` in the place of a file for a moment, in which it must be named."""
    content = path.read_bytes()
    path.write_bytes(damaged)
    is_named = any(path.name in problem for problem in find_problems(checkpoint))
    path.write_bytes(content)
    assert is_named or (path.name == "manifest.json" and is_unchanged(bytearray(damaged), content)), (
        path,
        damaged[-20:],
    )


def test_every_damage_to_every_file_is_found(run: Path, fault: FaultRecorder) -> None:
    newest, rng = list_checkpoints(run / "checkpoints")[0], random.Random(5)
    files = files_of(newest)
    assert {"manifest.json", "config.yaml", "counters.json", "rank-00001.safetensors"} <= {path.name for path in files}
    seeds = range(50)
    for path in files:
        content = path.read_bytes()
        for damage in DAMAGES.values():
            check_found(newest, path, damage(content, rng))
    for seed in seeds:
        rng = random.Random(seed)
        path = rng.choices(files, weights=[path.stat().st_size for path in files])[0]
        check_found(newest, path, flip(path.read_bytes(), rng))
    assert find_problems(newest) == []
    count = len(files) * len(DAMAGES) + len(seeds)
    fault.record("damaged-checkpoint", injected=count, survived=count)


@pytest.mark.fault("missing-shard")
def test_a_missing_file_of_one_rank_makes_all_ranks_take_the_checkpoint_before(run: Path) -> None:
    expected = state_of(run, STEPS)
    newest = list_checkpoints(run / "checkpoints")[0]
    (newest / "state" / "rank-00001.safetensors").unlink()
    (run / "checkpoints" / "latest").write_text("step-0000099\n")
    with live_ranks(2, run.parent / "run.yaml") as ranks:
        assert ranks.wait() == [0, 0], ranks.output()
    output = ranks.output(0)
    assert "rank-00001.safetensors: is missing" in output
    assert "continuing from" in output
    assert "step-0000003" in output
    assert newest.with_name(f"{newest.name}.bad").is_dir()
    assert state_of(run, STEPS) == expected


@pytest.mark.fault("no-good-checkpoint")
def test_where_no_checkpoint_is_good_every_start_is_refused(run: Path) -> None:
    for folder in list_checkpoints(run / "checkpoints"):
        path = folder / "state" / "rank-00000.safetensors"
        path.write_bytes(flip(path.read_bytes(), random.Random(1)))
    records = len(read_metrics(run))
    for _ in range(2):  # the second one finds them set aside
        with live_ranks(2, run.parent / "run.yaml") as ranks:
            assert ranks.wait() == [1, 1], ranks.output()
        for rank in range(2):
            (line,) = ranks.errors(rank)
            assert "no checkpoint is good" in line
            assert all(f"step-000000{step}" in ranks.output(rank) for step in (3, 6))
    assert len(read_metrics(run)) == records


@pytest.mark.fault("no-good-checkpoint")
def test_from_scratch_begins_again_where_no_checkpoint_is_good_and_nowhere_else(run: Path) -> None:
    expected = state_of(run, STEPS)
    for folder in list_checkpoints(run / "checkpoints"):
        (folder / "manifest.json").unlink()
    for begins in (True, False):
        with live_ranks(2, run.parent / "run.yaml", "--from-scratch") as ranks:
            assert ranks.wait() == [0, 0], ranks.output()
        assert ("beginning at step 0, as asked" in ranks.output(0)) is begins
        assert state_of(run, STEPS) == expected
