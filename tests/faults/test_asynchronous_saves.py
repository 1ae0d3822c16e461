"""Faults while a checkpoint is written beside training: slow and full disks, kills, signals, NaN in the state.

What happens in the writing thread is slowed, failed or killed from outside by what it calls; the ranks are real.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import RankFailedError, run_ranks
from live_ranks import run_training
from small_runs import write_small_run

from pretrain import durable
from pretrain.checkpoint import captured_state
from pretrain.checkpoint.manifest import CheckpointManifest, find_problems, list_checkpoints, step_folder
from pretrain.checkpoint.store import CheckpointStore
from pretrain.engine.engine import Engine
from pretrain.metrics import read_metrics
from pretrain.resilience import stop_request

pytestmark = pytest.mark.slow

STEPS = 12
RUN: dict[str, Any] = {"train__steps": STEPS, "train__eval_every": 100, "checkpoint": {"every_steps": 4, "keep": 9}}
Prepare = Callable[..., None]


def run_rank(arguments: list[str], prepare: Prepare | None = None, *args: Any) -> tuple[object, str]:
    """The training program as one rank, after `prepare(*args)` in its process: exit code and errors."""
    if prepare is not None:
        prepare(*args)
    return run_training(arguments)


def arguments_of(folder: Path, *overrides: str) -> list[str]:
    return ["--config", str(write_small_run(folder, **RUN)), *overrides]


def own_rank() -> int:
    return int(os.environ["RANK"])


def is_beside_training() -> bool:
    return threading.current_thread() is not threading.main_thread()


def hashes_of(run: Path) -> dict[str, dict[str, str]]:
    """Of every state file of every checkpoint."""
    found = {}
    for folder in list_checkpoints(run / "checkpoints"):
        assert find_problems(folder) == []
        records = CheckpointManifest.load(folder).files
        found[folder.name] = {r.name: r.xxh3_128 for r in records if r.name.startswith("state/")}
    return found


def folders_of(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run of two ranks, saved synchronously."""
    folder = tmp_path_factory.mktemp("clean")
    arguments = arguments_of(folder, "checkpoint.asynchronous=false")
    assert [code for code, _ in run_ranks(2, run_rank, arguments)] == [0, 0]
    return folder / "run"


# -- the same bytes, while steps go on ---------------------------------------------------------------------------------


def slow_down(seconds: float) -> None:
    """Writing begins late, and every fsync of the writing thread takes time."""
    write_state, fsync = captured_state.write_state, os.fsync

    def write_late(*args: Any) -> Any:
        time.sleep(seconds)
        return write_state(*args)

    def sync_slowly(descriptor: int) -> None:
        time.sleep(seconds / 10 if is_beside_training() else 0)
        fsync(descriptor)

    captured_state.write_state = write_late  # type: ignore[assignment]
    durable.os.fsync = sync_slowly


@pytest.mark.parametrize(
    "layout", [("zero.stage=1",), ("zero.stage=3",), ("parallel.pipeline=2",)], ids=["ZeRO-1", "ZeRO-3", "PP2"]
)
def test_steps_go_on_while_a_slow_disk_writes_and_the_bytes_are_those_of_a_synchronous_run(
    layout: tuple[str, ...], tmp_path: Path, clean: Path
) -> None:
    import megatron.core.tensor_parallel  # noqa: F401  # before the ranks fork

    arguments = arguments_of(tmp_path, *layout)
    assert [code for code, _ in run_ranks(2, run_rank, arguments, slow_down, 0.2)] == [0, 0]
    if layout != ("zero.stage=1",):
        clean = tmp_path / "clean"
        settings = (*layout, f"run.output_dir={clean}", "checkpoint.asynchronous=false")
        assert [code for code, _ in run_ranks(2, run_rank, arguments_of(tmp_path, *settings))] == [0, 0]
    found = hashes_of(tmp_path / "run")
    assert list(found) == ["step-0000012", "step-0000008", "step-0000004"]
    assert found == hashes_of(clean)
    records = read_metrics(tmp_path / "run")
    told = [index for index, record in enumerate(records) if "save_write_seconds" in record]
    assert [records[index]["step"] for index in told] == [4, 8, 12]
    before = {record["step"] for record in records[: told[0]] if "loss" in record}
    assert max(before) > 4, "no step was done while the first checkpoint was written"
    assert records[told[0]]["save_stall_seconds"] < records[told[0]]["save_write_seconds"]


def count_saves(report: Path) -> None:
    """Rank 0 leaves, for every save, how many were on their way at once."""
    slow_down(0.6)
    save, active = CheckpointStore.save, [0]

    def counting(*args: Any, **kwargs: Any) -> Path:
        active[0] += 1
        with report.open("a") as file:
            file.write(f"{active[0]} {is_beside_training()}\n")
        try:
            return save(*args, **kwargs)
        finally:
            active[0] -= 1

    CheckpointStore.save = counting  # type: ignore[method-assign]


def test_one_save_at_a_time_also_when_each_step_asks_for_one(tmp_path: Path) -> None:
    arguments = arguments_of(tmp_path, "checkpoint.every_steps=1", "train.steps=4", "optim.warmup_steps=1")
    assert run_ranks(1, run_rank, arguments, count_saves, tmp_path / "report")[0][0] == 0
    assert (tmp_path / "report").read_text() == "1 True\n" * 4
    stalls = [r["save_stall_seconds"] for r in read_metrics(tmp_path / "run") if "save_stall_seconds" in r]
    assert min(stalls) > 0.1  # each was waited for: by the next one, or by the end


# -- kills -------------------------------------------------------------------------------------------------------------


def kill_own_process() -> None:
    time.sleep(0.1)  # training goes on
    os.kill(os.getpid(), signal.SIGKILL)


def kill_while_writing() -> None:
    def write(checkpoint: Path, *args: Any) -> None:
        (checkpoint / "state").mkdir(exist_ok=True)
        (checkpoint / "state" / "rank-00001.safetensors").write_bytes(b"half")
        kill_own_process()

    captured_state.write_state = write  # type: ignore[assignment]


def kill_at_sync_of(is_meant: Callable[[Path], bool]) -> None:
    sync_folder = durable.sync_folder

    def sync(folder: Path) -> None:
        if is_beside_training() and is_meant(folder):
            kill_own_process()
        sync_folder(folder)

    durable.sync_folder = sync


def kill_after_latest() -> None:
    CheckpointStore._prune = lambda _: kill_own_process()  # type: ignore[method-assign]


# Where, on which rank, and whether what it was writing is a checkpoint after the kill.
KILLS: dict[str, tuple[int, Callable[[], None], bool]] = {
    "while writing": (1, kill_while_writing, False),
    "before the rename": (0, lambda: kill_at_sync_of(lambda folder: folder.suffix == ".tmp"), False),
    "before latest": (0, lambda: kill_at_sync_of(lambda folder: folder.name == "checkpoints"), True),
    "after latest": (0, kill_after_latest, True),
}


def kill_at(place: str) -> None:
    rank, prepare, _ = KILLS[place]
    if own_rank() == rank:
        prepare()


@pytest.mark.fault("kill-in-save")
def test_killed_at_every_place_of_a_save_beside_training_and_continued_bit_for_bit(tmp_path: Path, clean: Path) -> None:
    """One run, started five times: each place is met by the first save of a start."""
    arguments, run = arguments_of(tmp_path, "checkpoint.every_steps=2"), tmp_path / "run"
    good = 0
    for place, (_, _, is_committed) in KILLS.items():
        with pytest.raises(RankFailedError):
            run_ranks(2, run_rank, arguments, kill_at, place)
        left = [name for name in folders_of(run) if name.endswith(".tmp")]
        assert left == ([] if is_committed else [f"step-{good + 2:07d}.tmp"]), place
        good += 2 * is_committed
        newest = list_checkpoints(run / "checkpoints")[:1]
        assert newest == ([step_folder(run / "checkpoints", good)] if good else []), place
        assert not newest or find_problems(newest[0]) == []
    assert [code for code, _ in run_ranks(2, run_rank, arguments)] == [0, 0]
    found, expected = hashes_of(run), hashes_of(clean)
    assert [found[name] for name in expected] == list(expected.values())
    assert not [name for name in folders_of(run) if name.endswith(".tmp")]


# -- disks -------------------------------------------------------------------------------------------------------------


def fill_disk(save: int) -> None:
    """From save number `save` on rank 1 may write no large file."""
    if own_rank() != 1:
        return
    capture_state, saves = Engine.capture_state, iter(range(1, 100))

    def capture(self: Engine, **kwargs: Any) -> Any:
        if next(saves) == save:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        return capture_state(self, **kwargs)

    Engine.capture_state = capture  # type: ignore[method-assign]


@pytest.mark.fault("full-disk")
@pytest.mark.parametrize("mode", ["true", "false"])
def test_a_disk_that_refuses_one_rank_ends_all_with_the_same_line(mode: str, tmp_path: Path) -> None:
    arguments = arguments_of(tmp_path, f"checkpoint.asynchronous={mode}")
    for rank, (code, errors) in enumerate(run_ranks(2, run_rank, arguments, fill_disk, 2)):
        assert code == 1
        who = "" if rank == 0 else "[rank 1] "
        folder = tmp_path / "run" / "checkpoints" / "step-0000008"
        assert errors.splitlines()[-1] == (
            f"{who}error: {folder}: not saved, earlier checkpoints are untouched: rank 1: [Errno 27] File too large"
        )
        assert "Traceback" not in errors
    assert folders_of(tmp_path / "run") == ["step-0000004"]
    assert list(hashes_of(tmp_path / "run")) == ["step-0000004"]
    assert [code for code, _ in run_ranks(2, run_rank, arguments)] == [0, 0]


# -- signals -----------------------------------------------------------------------------------------------------------


def stop_in_first_save() -> None:
    """Rank 1 is asked to stop while its first state is written, slowly."""
    slow_down(0.6)
    write_state, saves = captured_state.write_state, iter(range(100))

    def write(*args: Any) -> Any:
        if own_rank() == 1 and next(saves) == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return write_state(*args)

    captured_state.write_state = write  # type: ignore[assignment]


@pytest.mark.fault("stop-signal")
def test_a_signal_during_a_save_ends_it_first_and_then_saves_once_more(tmp_path: Path, clean: Path) -> None:
    arguments, run = arguments_of(tmp_path), tmp_path / "run"
    for code, errors in run_ranks(2, run_rank, arguments, stop_in_first_save):
        assert code == 75, errors
    first, second = folders_of(run)
    assert first == "step-0000004"
    assert 4 < CheckpointManifest.load(run / "checkpoints" / second).step < 8
    assert [code for code, _ in run_ranks(2, run_rank, arguments)] == [0, 0]
    found, expected = hashes_of(run), hashes_of(clean)
    assert [found[name] for name in expected] == list(expected.values())


def insist_in_last_save(step: int) -> None:
    """One signal before the save of `step`, and another while it is written, which would take for ever."""
    stop_request.ECHO_SECONDS = 0.0
    capture_state, captured = Engine.capture_state, iter(range(step, 100, step))

    def capture(self: Engine, **kwargs: Any) -> Any:
        if next(captured) == 2 * step:
            os.kill(os.getpid(), signal.SIGTERM)
            captured_state.write_state = write_for_ever  # type: ignore[assignment]
        return capture_state(self, **kwargs)

    def write_for_ever(*_: Any) -> None:
        time.sleep(0.5)  # the main thread waits for the commit by now
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    Engine.capture_state = capture  # type: ignore[method-assign]


@pytest.mark.fault("second-signal")
def test_a_second_signal_ends_at_once_and_corrupts_nothing(tmp_path: Path) -> None:
    arguments, run = arguments_of(tmp_path), tmp_path / "run"
    start = time.monotonic()
    with pytest.raises(RankFailedError):
        run_ranks(1, run_rank, [*arguments, "train.steps=8"], insist_in_last_save, 4)
    assert time.monotonic() - start < 50
    assert folders_of(run) == ["step-0000004", "step-0000008.tmp"]
    assert list(hashes_of(run)) == ["step-0000004"]
    arguments += ["--allow-change", "train.steps"]
    assert run_ranks(1, run_rank, arguments)[0][0] == 0
    assert folders_of(run) == ["step-0000004", "step-0000008", "step-0000012"]


# -- values that are no numbers ----------------------------------------------------------------------------------------


def poison(step: int, kind: str) -> None:
    """After `step` a value of rank 1's last range of this kind is no number."""
    if own_rank() != 1:
        return
    train_step, steps = Engine.train_step, iter(range(1, 100))

    def call(self: Engine, *args: Any, **kwargs: Any) -> Any:
        result = train_step(self, *args, **kwargs)
        if next(steps) == step:
            place = [candidate for candidate in self.state.ranges() if candidate.kind == kind][-1]
            self.state.values(place)[-1] = math.nan
        return result

    Engine.train_step = call  # type: ignore[method-assign]


@pytest.mark.fault("non-finite")
@pytest.mark.parametrize(("mode", "kind", "words"), [("true", "exp_avg_sq", "second"), ("false", "exp_avg", "first")])
def test_a_moment_that_is_no_number_is_never_saved(mode: str, kind: str, words: str, tmp_path: Path) -> None:
    arguments = arguments_of(tmp_path, f"checkpoint.asynchronous={mode}")
    for code, errors in run_ranks(2, run_rank, arguments, poison, 8, kind):
        assert code == 1
        last = errors.splitlines()[-1]
        assert (
            "step-0000008: not saved, earlier checkpoints are untouched (the last one is of step 4): rank 1: " in last
        )
        assert f"{words} moment of " in last
        assert "Traceback" not in errors
    assert folders_of(tmp_path / "run") == ["step-0000004"]
    assert [code for code, _ in run_ranks(2, run_rank, arguments)] == [0, 0]
    assert list(hashes_of(tmp_path / "run")) == ["step-0000012", "step-0000008", "step-0000004"]
