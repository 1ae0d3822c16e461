"""Ranks that stop, hang or are killed: named in bounded time, with stacks and exit code 124; slow ones may go on."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import started_ranks
from live_ranks import last_step
from small_runs import write_small_run

from pretrain.checkpoint.captured_state import CapturedState
from pretrain.checkpoint.manifest import list_checkpoints
from pretrain.cli import run_program
from pretrain.data.batches import BatchSource
from pretrain.engine.engine import Engine
from pretrain.metrics import read_metrics
from pretrain.model.pretraining import LossHead
from pretrain.train import app

PERIOD, SILENCE, HANG = 0.2, 1.5, 3600.0
QUICK = {
    "heartbeat_seconds": PERIOD,
    "start_seconds": 60.0,
    "step_seconds": SILENCE,
    "evaluation_seconds": SILENCE,
    "checkpoint_seconds": SILENCE,
    "factor": 1.0,
}
# What a watchdog may take: the silence, two looks at the others, the patience of ranks that leave it to rank 0, and the
# time that all have for their stacks.
BOUND = SILENCE + 20 * PERIOD + 5


def small_run(folder: Path, **changes: Any) -> Path:
    usual = {"train__steps": 2000, "train__eval_every": 2000, "checkpoint": {"every_steps": 3}, "watchdog": QUICK}
    return write_small_run(folder, **usual | changes)


def train_rank(config: Path, lay_trap: Callable[[int], None] | None, *overrides: str) -> None:
    """One rank of the training program, with something in it that goes wrong."""
    if lay_trap is not None:
        lay_trap(int(os.environ["RANK"]))
    run_program(app, ["--config", str(config), *overrides])


def before_micro_batches(action: Callable[[int], None]) -> None:
    """Let this rank do something before it makes a micro-batch, whose number `action` gets."""
    original = BatchSource.micro_batch

    def micro_batch(self: BatchSource, index: int) -> Any:
        action(index)
        return original(self, index)

    BatchSource.micro_batch = micro_batch  # type: ignore[method-assign]


def hangs_in_data(rank: int) -> None:
    def a_read_that_never_ends(index: int) -> None:
        if rank == 1 and index >= 16:
            time.sleep(HANG)

    before_micro_batches(a_read_that_never_ends)


def keeps_the_interpreter(rank: int) -> None:
    def c_code_that_never_returns(index: int) -> None:
        if rank == 1 and index >= 16:
            ctypes.PyDLL(None).sleep(int(HANG))

    before_micro_batches(c_code_that_never_returns)


def reads_slowly(rank: int) -> None:
    before_micro_batches(lambda index: time.sleep(0.4 if rank == 1 else 0.0))


def hangs_in_evaluation(rank: int) -> None:
    original = Engine.evaluate

    def an_evaluation_that_never_ends(self: Engine, batches: Any) -> Any:
        time.sleep(HANG if rank == 1 else 0.0)
        return original(self, batches)

    Engine.evaluate = an_evaluation_that_never_ends  # type: ignore[method-assign]


def hangs_in_forward(rank: int) -> None:
    original = LossHead.__call__

    def a_kernel_that_never_ends(self: LossHead, *args: Any, **kwargs: Any) -> Any:
        if kwargs["micro_batch_index"] == 9:  # only the last stage comes here
            time.sleep(HANG)
        return original(self, *args, **kwargs)

    LossHead.__call__ = a_kernel_that_never_ends  # type: ignore[method-assign]


def starts_and_saves_slowly(rank: int) -> None:
    train_step, write = Engine.train_step, CapturedState.write
    pause = SILENCE + 4 * PERIOD if rank == 1 else 0.0
    pauses = iter((pause,))

    def slow_first_step(self: Engine, *args: Any, **kwargs: Any) -> Any:
        time.sleep(next(pauses, 0.0))
        return train_step(self, *args, **kwargs)

    def slow_write(self: CapturedState, folder: Path) -> Any:
        time.sleep(pause)
        return write(self, folder)

    Engine.train_step, CapturedState.write = slow_first_step, slow_write  # type: ignore[method-assign]


@pytest.fixture
def _megatron() -> None:
    import megatron.core.tensor_parallel  # noqa: F401  # before ranks fork


def line_with(words: str, log: str) -> str:
    """The one line of a log that has these words."""
    (line,) = (line for line in log.splitlines() if words in line)
    return line


def stacks_of(run: Path, rank: int) -> str:
    return (run / "logs" / f"rank_{rank:05d}.stacks").read_text()


@pytest.mark.fault("hang")
def test_a_stopped_rank_is_named_and_the_others_end(tmp_path: Path) -> None:
    config, run = small_run(tmp_path), tmp_path / "run"
    with started_ranks(3, train_rank, config, None, "train.global_batch_size=12") as ranks:
        ranks.wait_until(lambda: last_step(run) >= 4 and list_checkpoints(run / "checkpoints"))
        ranks.send(signal.SIGSTOP, 1)
        assert ranks.wait(BOUND, [0, 2]) == [124, 124], ranks.output(0)
        for rank in (0, 2):
            verdict = line_with("hang in step", ranks.output(rank))
            assert f"rank 1 on {os.uname().nodename} (process {ranks.pids[1]}) does not run" in verdict
            assert "2 ranks wait in " in verdict
            assert "continues from step-00000" in verdict
            assert "in train_step" in stacks_of(run, rank)
        assert "hang in step" in (run / "logs" / "rank_00000.log").read_text()


@pytest.mark.slow
@pytest.mark.fault("hang")
def test_a_data_loader_that_hangs_is_named(tmp_path: Path) -> None:
    config, run = small_run(tmp_path), tmp_path / "run"
    with started_ranks(2, train_rank, config, hangs_in_data) as ranks:
        assert ranks.wait(60) == [124, 124], ranks.output(0)
        verdict = line_with("hang in step", ranks.output(0))
        assert "hang in step 5: rank 1 on " in verdict
        assert "is behind: in data of step 5 for " in verdict
        assert "at pretrain/data/batches.py" in verdict
        assert "1 rank waits in " in verdict
        assert verdict == line_with("hang in step", ranks.output(1)).removeprefix("[rank 1] ")
        assert "a_read_that_never_ends" in stacks_of(run, 1)
        assert "a_read_that_never_ends" not in stacks_of(run, 0)


@pytest.mark.fault("hang")
@pytest.mark.slow
def test_an_evaluation_that_hangs_is_named(tmp_path: Path) -> None:
    config, run = small_run(tmp_path, train__eval_every=3), tmp_path / "run"
    with started_ranks(2, train_rank, config, hangs_in_evaluation) as ranks:
        assert ranks.wait(60) == [124, 124], ranks.output(0)
        verdict = line_with("hang in step", ranks.output(0))
        assert "hang in step 3: rank 1 on " in verdict
        assert "in evaluation of step 3" in verdict
        assert "an_evaluation_that_never_ends" in stacks_of(run, 1)


@pytest.mark.fault("kill")
@pytest.mark.slow
def test_survivors_of_a_killed_rank_say_so_in_one_line(tmp_path: Path) -> None:
    config, run = small_run(tmp_path), tmp_path / "run"
    with started_ranks(3, train_rank, config, None, "train.global_batch_size=12") as ranks:
        ranks.wait_until(lambda: last_step(run) >= 4 and list_checkpoints(run / "checkpoints"))
        ranks.send(signal.SIGKILL, 2)
        assert ranks.wait(20) == [1, 1, -signal.SIGKILL], ranks.output(0)
        for rank in (0, 1):
            assert "Traceback" not in ranks.output(rank)
            line = line_with("error: lost contact with another rank in step ", ranks.output(rank))
            assert "(between steps)" not in line
            assert "the same command continues from step-00000" in line


@pytest.mark.fault("hang")
@pytest.mark.slow
def test_code_that_keeps_the_interpreter_is_ended_by_the_guard(tmp_path: Path) -> None:
    config, run = small_run(tmp_path), tmp_path / "run"
    with started_ranks(2, train_rank, config, keeps_the_interpreter) as ranks:
        assert ranks.wait(60) == [124, -signal.SIGKILL], ranks.output(0)
        assert "rank 1 on " in line_with("hang in step", ranks.output(0))
        assert "does not run" in line_with("hang in step", ranks.output(0))
        assert "C code keeps its interpreter" in ranks.output(1)
        assert "in c_code_that_never_returns" in stacks_of(run, 1)


@pytest.mark.fault("hang")
@pytest.mark.slow
@pytest.mark.usefixtures("_megatron")
def test_a_pipeline_stage_that_hangs_is_named(tmp_path: Path) -> None:
    config = small_run(tmp_path)
    with started_ranks(2, train_rank, config, hangs_in_forward, "parallel.pipeline=2") as ranks:
        assert ranks.wait(60) == [124, 124], ranks.output(0)
        verdict = line_with("hang in step", ranks.output(0))
        assert "rank 1 on " in verdict
        assert "does not join the others: in forward pass of step 3" in verdict
        assert "1 rank waits in recv grad of step 3" in verdict


@pytest.mark.fault("hang")
@pytest.mark.slow
def test_a_slow_rank_is_named_and_the_run_finishes(tmp_path: Path) -> None:
    config = small_run(tmp_path, train__steps=8, checkpoint={}, watchdog={**QUICK, "step_seconds": 30.0})
    with started_ranks(3, train_rank, config, reads_slowly, "train.global_batch_size=12") as ranks:
        assert ranks.wait(60) == [0, 0, 0], ranks.output(0)
        line = line_with("is slow", ranks.output(0))
        assert f"rank 1 on {os.uname().nodename} is slow" in line
        assert "is slow" not in ranks.output(1)
    records = [record for record in read_metrics(tmp_path / "run") if "slow_rank" in record]
    assert records
    assert {record["slow_rank"] for record in records} == {1}
    assert all(record["slow_share"] > 1 for record in records)


@pytest.mark.fault("hang")
@pytest.mark.slow
def test_slow_starts_and_saves_and_a_suspended_job_are_no_hangs(tmp_path: Path) -> None:
    patient = {**QUICK, "checkpoint_seconds": 30.0, "evaluation_seconds": 30.0}
    config, run = small_run(tmp_path, train__steps=30, watchdog=patient), tmp_path / "run"
    with started_ranks(2, train_rank, config, starts_and_saves_slowly, "checkpoint.every_steps=20") as ranks:
        ranks.wait_until(lambda: last_step(run) >= 4)
        ranks.send(signal.SIGSTOP)
        time.sleep(SILENCE + 3 * PERIOD)
        ranks.send(signal.SIGCONT)
        assert ranks.wait(60) == [0, 0], ranks.output(0)
    assert not list((run / "logs").glob("*.stacks"))
