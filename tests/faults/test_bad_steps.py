"""NaN and infinite losses: every rank skips the same step, the rows are written down, too many in a row end the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import RankFailedError, run_ranks
from small_runs import write_small_run

from pretrain.checkpoint.manifest import CheckpointManifest, find_checkpoint
from pretrain.checkpoint.weights import read_weights
from pretrain.metrics import read_metrics
from pretrain.model.pretraining import LossHead, PretrainingLosses
from pretrain.report.__main__ import report
from pretrain.resilience.bad_steps import BadSteps, NonFiniteLossError
from pretrain.resilience.spikes import Spikes
from pretrain.step import StepPlan
from pretrain.train import train

PER_STEP = 4  # micro-batches of a step of the small run
LAYOUTS = [
    pytest.param((1, "zero.stage=0"), id="ZeRO-0"),
    pytest.param((2, "zero.stage=0"), id="DP2 ZeRO-0", marks=pytest.mark.slow),
    pytest.param((2, "zero.stage=1"), id="DP2 ZeRO-1", marks=pytest.mark.slow),
    pytest.param((2, "zero.stage=3"), id="DP2 ZeRO-3", marks=pytest.mark.slow),
    pytest.param((2, "precision=bf16", "zero.stage=2"), id="DP2 ZeRO-2 bf16", marks=pytest.mark.slow),
    pytest.param((2, "parallel.tensor=2"), id="TP2", marks=pytest.mark.slow),
    pytest.param((2, "parallel.pipeline=2"), id="PP2", marks=pytest.mark.slow),
    pytest.param((2, "parallel.pipeline=2", "precision=bf16"), id="PP2 bf16", marks=pytest.mark.slow),
]


def poisoned(config: Path, bad: dict[int, float], *overrides: str, fail_at: int | None = None) -> None:
    """One rank of a run; the losses of the micro-batches in `bad` are multiplied by a number that is none.

    It may fail before a step, for another reason.
    """
    original, step = LossHead.__call__, Spikes.before_step

    def before_step(self: Spikes, plan: StepPlan) -> None:
        step(self, plan)
        if plan.number == fail_at:
            raise RuntimeError("another reason")

    def call(self: LossHead, *args: Any, **kwargs: Any) -> PretrainingLosses:
        losses = original(self, *args, **kwargs)
        factor = bad.get(kwargs["micro_batch_index"], 1.0) if torch.is_grad_enabled() else 1.0
        return losses._replace(total=losses.total * factor)

    LossHead.__call__, Spikes.before_step = call, before_step  # type: ignore[method-assign]
    train(config=config, overrides=list(overrides), dry_run=False, allow_change=None)


@pytest.mark.fault("non-finite")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_micro_batch_skips_the_step_on_every_rank(layout: tuple[Any, ...], tmp_path: Path) -> None:
    world_size, *overrides = layout
    config = write_small_run(tmp_path, train__steps=5, optim__warmup_steps=1, checkpoint={"every_steps": 1, "keep": 5})
    # In the second and the fourth step; with two data-parallel ranks they are the other one's.
    first, second = 1 + 1 * PER_STEP, 1 + 3 * PER_STEP
    run_ranks(world_size, poisoned, config, {first: float("nan"), second: float("inf")}, *overrides)
    run = tmp_path / "run"
    records = [json.loads(line) for line in (run / "bad_steps.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4]
    assert [record["rows"] for record in records] == [[[bad * 4, (bad + 1) * 4]] for bad in (first, second)]
    metrics = {record["step"]: record for record in read_metrics(run) if "lr" in record}
    assert {step: record["skipped_steps"] for step, record in metrics.items()} == {1: 0, 2: 1, 3: 1, 4: 2, 5: 2}
    weights = [read_weights(run / "checkpoints" / f"step-000000{step}") for step in (1, 2, 3, 4)]
    for before, after in ((0, 1), (2, 3)):
        assert all(torch.equal(tensor, weights[after][name]) for name, tensor in weights[before].items())
    assert any(not torch.equal(tensor, weights[2][name]) for name, tensor in weights[1].items())
    assert all(tensor.isfinite().all() for tensor in read_weights(find_checkpoint(run)).values())
    report(run)  # a curve with a hole
    assert (run / "report.html").is_file()


@pytest.mark.fault("non-finite")
def test_too_many_bad_steps_in_a_row_end_the_run_and_keep_the_last_good_state(tmp_path: Path) -> None:
    config = write_small_run(tmp_path, train__steps=9, train__max_bad_steps=3, checkpoint={"every_steps": 2})
    bad = {step * PER_STEP: float("nan") for step in (2, 4, 5, 6)}
    with pytest.raises(RankFailedError, match="step 7: loss or gradient not finite for 3 steps in a row") as caught:
        run_ranks(1, poisoned, config, bad)
    assert "the last checkpoint is of step 6" in str(caught.value)
    assert "bad_steps.jsonl" in str(caught.value)
    folder = find_checkpoint(tmp_path / "run")
    assert CheckpointManifest.load(folder).step == 6
    assert all(tensor.isfinite().all() for tensor in read_weights(folder).values())


@pytest.mark.fault("non-finite")
@pytest.mark.slow
def test_bad_steps_in_a_row_are_counted_across_starts(tmp_path: Path) -> None:
    """Steps 3 to 5 are bad; the run fails after the second of them, and the third is one too many."""
    config = write_small_run(tmp_path, train__max_bad_steps=3, checkpoint={"every_steps": 4})
    bad = {step * PER_STEP: float("nan") for step in (2, 3, 4)}
    run = tmp_path / "run"
    with pytest.raises(RankFailedError, match="another reason"):
        run_ranks(1, poisoned, config, bad, fail_at=5)
    counters = json.loads((find_checkpoint(run) / "state" / "counters.json").read_text())
    assert (counters["skipped_steps"], counters["other_counts"]) == (2, {"bad_steps_in_a_row": 2})
    with pytest.raises(RankFailedError, match="step 5: loss or gradient not finite for 3 steps in a row"):
        run_ranks(1, poisoned, config, bad)


@pytest.mark.fault("non-finite")
def test_what_scaling_skips_is_no_bad_step_and_what_is_not_skipped_ends_the_run(tmp_path: Path) -> None:
    scaled = BadSteps(tmp_path, limit=2, is_scaled=True)
    assert not any(scaled.note(step, 5.0, float("inf"), is_skipped=True) for step in range(20))
    assert scaled.note(21, float("nan"), float("inf"), is_skipped=True)
    assert not scaled.note(22, 5.0, 1.0, is_skipped=False)
    assert scaled.num_in_a_row == 0
    with pytest.raises(NonFiniteLossError, match="nothing of it is saved"):
        scaled.note(23, float("nan"), 1.0, is_skipped=False)


@pytest.mark.fault("logging")
def test_a_folder_that_cannot_be_written_is_no_second_fault(tmp_path: Path) -> None:
    BadSteps(tmp_path / "absent", 2, is_scaled=False).write_down(3, float("nan"), 1.0, [(0, 4)])
    assert not (tmp_path / "absent").exists()
