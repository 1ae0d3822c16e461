"""Saves beside training: one at a time, told when they are over, refused where the state is no number."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoint_builders import manifest

from pretrain.checkpoint.captured_state import CapturedState
from pretrain.checkpoint.manifest import CheckpointManifest, find_problems, list_checkpoints
from pretrain.checkpoint.store import CheckpointStore
from pretrain.config.sections import CheckpointSection
from pretrain.durable import FileRecord, hashing_writer
from pretrain.errors import CheckpointError
from pretrain.metrics import MetricsLog, read_metrics
from pretrain.resilience.heartbeat import Heartbeat
from pretrain.saving import NonFiniteStateError, Saver, best_save_interval

WAIT = 20.0


class FakeState(CapturedState):
    """Writes one file when it is allowed to, or fails."""

    def __init__(self, engine: FakeEngine) -> None:
        super().__init__(0, [], {}.__getitem__, {}, {}, engine.problem)
        object.__setattr__(self, "_engine", engine)

    def write(self, folder: Path) -> list[FileRecord]:
        engine: FakeEngine = self._engine  # type: ignore[attr-defined]
        engine.num_begun += 1
        engine.may_write.wait(WAIT)
        if engine.error is not None:
            raise engine.error
        (folder / "state").mkdir()
        with hashing_writer(folder / "state" / "file") as file:
            file.write(b"x")
        return [FileRecord("state/file", file.num_bytes, file.hexdigest())]


class FakeEngine:
    """An engine whose state is written when the test says so."""

    def __init__(self) -> None:
        self.may_write = threading.Event()
        self.error: Exception | None = None
        self.problem: str | None = None
        self.num_begun = 0
        self.copied: list[bool] = []
        self.heartbeat = Heartbeat()

    def reserve_copies(self) -> None: ...

    def capture_state(self, *, copies: bool) -> CapturedState:
        self.copied.append(copies)
        return FakeState(self)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


def saver_of(
    engine: FakeEngine, folder: Path, *, is_asynchronous: bool = True, extras: dict[str, bytes] | None = None
) -> Saver:
    store = CheckpointStore(folder / "checkpoints", keep=9)
    store.prepare()
    fake: Any = engine
    metrics = MetricsLog(folder, is_active=True, use_tensorboard=False)
    return Saver(fake, store, extras or {}, metrics, CheckpointSection(asynchronous=is_asynchronous))


def wait_until(condition: Any) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_a_save_is_no_checkpoint_and_counts_as_unsaved_until_it_is_written(engine: FakeEngine, tmp_path: Path) -> None:
    saver = saver_of(engine, tmp_path)
    time.sleep(0.2)
    saver.save(manifest(5))
    assert (saver.captured_step, saver.committed_step, saver.is_writing) == (5, 0, True)
    saver.poll()
    assert saver.is_writing
    assert not list_checkpoints(tmp_path / "checkpoints")
    assert saver.unsaved_seconds >= 0.2 > saver.seconds_since_capture
    engine.may_write.set()
    wait_until(lambda: (saver.poll(), not saver.is_writing)[1])
    assert saver.committed_step == 5
    assert saver.unsaved_seconds == pytest.approx(saver.seconds_since_capture, abs=0.01)
    (folder,) = list_checkpoints(tmp_path / "checkpoints")
    assert find_problems(folder) == []


def test_a_second_save_begins_when_the_first_is_over(engine: FakeEngine, tmp_path: Path) -> None:
    saver = saver_of(engine, tmp_path)
    saver.save(manifest(5))
    threading.Timer(0.3, engine.may_write.set).start()
    saver.save(manifest(6))
    assert engine.num_begun <= 2
    assert saver.committed_step == 5
    saver.wait()
    assert saver.committed_step == 6
    first, second = read_metrics(tmp_path)
    assert (first["step"], second["step"]) == (5, 6)
    assert first["save_stall_seconds"] >= 0.2  # training waited for it
    assert first["save_write_seconds"] >= 0.2
    assert second["save_stall_seconds"] < 0.2
    assert engine.copied == [True, True]


def test_a_synchronous_save_makes_no_copy_and_is_over_when_it_returns(engine: FakeEngine, tmp_path: Path) -> None:
    saver = saver_of(engine, tmp_path, is_asynchronous=False)
    threading.Timer(0.2, engine.may_write.set).start()
    saver.save(manifest(5))
    assert (saver.committed_step, saver.is_writing, engine.copied) == (5, False, [False])
    (record,) = read_metrics(tmp_path)
    assert record["save_stall_seconds"] >= record["save_write_seconds"] >= 0.15


@pytest.mark.parametrize("is_asynchronous", [True, False])
def test_a_failed_save_says_the_same_beside_training_and_in_it(
    engine: FakeEngine, tmp_path: Path, is_asynchronous: bool
) -> None:
    saver = saver_of(engine, tmp_path, is_asynchronous=is_asynchronous)
    engine.may_write.set()
    saver.save(manifest(5))
    saver.wait()
    engine.error = OSError(28, "No space left on device")
    with pytest.raises(CheckpointError, match=r"step-0000006: not saved, earlier checkpoints are untouched: rank 0"):
        fail(saver)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()] == ["step-0000005"]
    assert saver.committed_step == 5
    saver.settle()  # told once


def fail(saver: Saver) -> None:
    saver.save(manifest(6))
    wait_until(lambda: saver.has_failed)
    saver.poll()
    assert saver.has_failed  # heard of by all ranks at the next step, not taken notice of by one
    saver.wait()


def test_settling_hides_no_other_error(engine: FakeEngine, tmp_path: Path) -> None:
    saver = saver_of(engine, tmp_path)
    engine.error = RuntimeError("connection closed by peer")
    engine.may_write.set()
    saver.save(manifest(5))
    saver.settle()
    assert not saver.is_writing
    assert saver.committed_step == 0


@pytest.mark.parametrize("is_asynchronous", [True, False])
def test_a_state_that_is_no_number_is_never_written(engine: FakeEngine, tmp_path: Path, is_asynchronous: bool) -> None:
    saver = saver_of(engine, tmp_path, is_asynchronous=is_asynchronous)
    engine.may_write.set()
    saver.save(manifest(5))
    engine.problem = "second moment of a: 1 of the 12 values from 0 on are NaN or infinite"
    with pytest.raises(
        NonFiniteStateError, match=r"step-0000006: not saved.*\(the last one is of step 5\): rank 0: second"
    ):
        saver.save(manifest(6))
    assert engine.num_begun == 1
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-0000005"]


def test_what_was_loaded_is_saved(engine: FakeEngine, tmp_path: Path) -> None:
    saver = saver_of(engine, tmp_path)
    time.sleep(0.05)
    saver.start_from(40)
    assert (saver.captured_step, saver.committed_step) == (40, 40)
    assert saver.unsaved_seconds < 0.05


def is_due(*, stall: float, since: float, is_writing: bool = False, **section: float) -> bool:
    limits = {"every_minutes": None, "hours_between_failures": None, **section}
    fake: Any = SimpleNamespace(
        _section=SimpleNamespace(**limits), is_writing=is_writing, stall_seconds=stall, seconds_since_capture=since
    )
    return Saver._is_due_by_time(fake)


def test_how_often_to_save_follows_from_how_long_training_stood_still_and_saves_never_overtake_each_other() -> None:
    best = best_save_interval(0.5, 6.0)
    assert not is_due(stall=0.5, since=0.99 * best, hours_between_failures=6.0)
    assert is_due(stall=0.5, since=1.01 * best, hours_between_failures=6.0)
    assert not is_due(stall=0.5, since=50 * best, hours_between_failures=6.0, is_writing=True)
    assert not is_due(stall=0.5, since=7200, every_minutes=10, is_writing=True)
    assert is_due(stall=0.5, since=601, every_minutes=10)
    assert not is_due(stall=0.5, since=7200)


def test_small_files_go_into_every_checkpoint_as_they_were_at_the_start(engine: FakeEngine, tmp_path: Path) -> None:
    engine.may_write.set()
    saver = saver_of(engine, tmp_path, extras={"config.yaml": b"run: {}", "tokenizer/vocab.txt": b"[PAD]"})
    saver.save(manifest(5))
    saver.wait()
    (folder,) = list_checkpoints(tmp_path / "checkpoints")
    assert find_problems(folder) == []
    assert (folder / "tokenizer" / "vocab.txt").read_bytes() == b"[PAD]"
    names = [record.name for record in CheckpointManifest.load(folder).files]
    assert names == ["config.yaml", "state/file", "tokenizer/vocab.txt"]
