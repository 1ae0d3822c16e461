"""A loss spike in a run: warned of, skipped on every rank, or left behind by a return to the last checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import started_ranks
from small_runs import write_small_run

from pretrain.checkpoint.manifest import CheckpointManifest, find_checkpoint
from pretrain.cli import run_program
from pretrain.engine.engine import Engine
from pretrain.metrics import read_metrics
from pretrain.model.pretraining import LossHead, PretrainingLosses
from pretrain.train import app

PER_STEP = 4  # micro-batches of a step of the small run
ROWS = 16
SPIKE = {"window": 4, "sigmas": 6.0}
LAYOUTS = [
    pytest.param((1, "zero.stage=0"), id="ZeRO-0"),
    pytest.param((2, "precision=bf16", "zero.stage=2", "optim.name=lamb"), id="ZeRO-2 LAMB", marks=pytest.mark.slow),
    pytest.param((2, "zero.stage=3"), id="DP2 ZeRO-3", marks=pytest.mark.slow),
    pytest.param((2, "parallel.pipeline=2"), id="PP2", marks=pytest.mark.slow),
]


def spiking(config: Path, bad: dict[int, float], *overrides: str, die_at: int | None = None) -> None:
    """One rank of a run in which losses of the micro-batches in `bad` are too large; it may die in its n-th step."""
    original, train_step, steps = LossHead.__call__, Engine.train_step, iter(range(1, 1000))

    def call(self: LossHead, *args: Any, **kwargs: Any) -> PretrainingLosses:
        losses = original(self, *args, **kwargs)
        factor = bad.get(kwargs["micro_batch_index"], 1.0) if torch.is_grad_enabled() else 1.0
        return losses._replace(total=losses.total * factor)

    def step(self: Engine, *args: Any, **kwargs: Any) -> Any:
        if next(steps) == die_at:
            os._exit(9)
        return train_step(self, *args, **kwargs)

    LossHead.__call__, Engine.train_step = call, step  # type: ignore[method-assign]
    run_program(app, ["--config", str(config), *overrides])


def ended(world_size: int, *args: Any, **kwargs: Any) -> list[int]:
    with started_ranks(world_size, spiking, *args, **kwargs) as ranks:
        return ranks.wait(60)


def small_run(folder: Path, policy: str, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    settings = {"train__steps": 12, "train__eval_every": 12, "spike": {**SPIKE, "policy": policy}}
    return write_small_run(folder, **settings | changes)


def spikes_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "spikes.jsonl").read_text().splitlines()]


def state_of(folder: Path) -> dict[str, str]:
    """Hashes of the files with weights and moments."""
    files = CheckpointManifest.load(folder).files
    return {file.name: file.xxh3_128 for file in files if file.name.endswith(".safetensors")}


def losses_of(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_metrics(run) if "lr" in record}


@pytest.fixture(scope="module", autouse=True)
def _megatron() -> None:
    import megatron.core.tensor_parallel  # noqa: F401  # before ranks fork


@pytest.mark.fault("spike")
def test_a_spike_is_warned_of_and_the_run_goes_on(tmp_path: Path) -> None:
    config = small_run(tmp_path, "warn")
    assert ended(1, config, {8 * PER_STEP: 20.0}) == [0]
    (record,) = spikes_of(tmp_path / "run")
    assert record["loss"] == losses_of(tmp_path / "run")[9] > record["bound"]
    assert (record["step"], record["rows"], record["action"]) == (9, [8 * ROWS, 9 * ROWS], "warn")


@pytest.mark.fault("spike")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_skipped_spike_leaves_no_trace(layout: tuple[Any, ...], tmp_path: Path) -> None:
    """Whatever its gradient was: weights and moments end as if another one had been thrown away."""
    world_size, *overrides = layout
    found = []
    for factor in (20.0, 300.0):
        folder = tmp_path / str(factor)
        config = small_run(folder, "skip", train__steps=10, checkpoint={"every_steps": None})
        assert ended(world_size, config, {8 * PER_STEP: factor}, *overrides) == [0] * world_size
        assert [(record["step"], record["action"]) for record in spikes_of(folder / "run")] == [(9, "skip")]
        skipped = {record["step"]: record["skipped_steps"] for record in read_metrics(folder / "run") if "lr" in record}
        assert (skipped[8], skipped[9], skipped[10]) == (0, 1, 1)
        found.append(state_of(find_checkpoint(folder / "run")))
    assert found[0] == found[1]


@pytest.mark.fault("spike")
@pytest.mark.slow
def test_skipped_steps_are_counted_across_starts(tmp_path: Path) -> None:
    """Two skipped steps; the run dies after the first one was saved, and again before a third save."""
    bad, found = {4 * PER_STEP: 20.0, 9 * PER_STEP: 20.0}, []
    for name, deaths in (("clean", []), ("killed", [9, 6])):
        folder = tmp_path / name
        config = small_run(folder, "skip")
        for step in deaths:
            assert ended(1, config, bad, die_at=step) == [9]
        assert ended(1, config, bad) == [0]
        run = folder / "run"
        counters = json.loads((find_checkpoint(run) / "state" / "counters.json").read_text())
        skipped = {record["step"]: record["skipped_steps"] for record in read_metrics(run) if "lr" in record}
        assert (skipped[4], skipped[5], skipped[9], skipped[10], skipped[12]) == (0, 1, 1, 2, 2)
        assert (counters["skipped_steps"], counters["optimizer_steps"]) == (2, 10)
        found.append((skipped, counters, state_of(find_checkpoint(run))))
    assert found[0] == found[1]


@pytest.mark.fault("spike")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "deaths"),
    [("zero.stage=3", [10]), ("parallel.pipeline=2", [10, 7])],
    ids=["ZeRO-3, killed after the rollback", "PP2, killed after it, and again after the next save"],
)
def test_a_run_killed_around_a_rollback_repeats_it(layout: str, deaths: list[int], tmp_path: Path) -> None:
    """Steps 1-8 and a spike in step 9; back to step 6, and on with the rows behind the spike."""
    bad, finals = {8 * PER_STEP + 1: 20.0}, []
    for name, die_at in (("clean", []), ("killed", deaths)):
        folder = tmp_path / name
        config = small_run(folder, "rollback")
        for step in die_at:
            assert set(ended(2, config, bad, layout, die_at=step)) == {9}
        assert ended(2, config, bad, layout) == [0, 0]
        manifest = CheckpointManifest.load(find_checkpoint(folder / "run"))
        assert (manifest.step, manifest.consumed_samples) == (12, (12 + 3) * ROWS)
        assert manifest.spikes["num_rollbacks"] == 1
        assert manifest.spikes["skipped_rows"] == [[6 * ROWS, 9 * ROWS]]
        finals.append((state_of(find_checkpoint(folder / "run")), manifest.spikes, losses_of(folder / "run")))
    assert finals[0] == finals[1]
    (record,) = spikes_of(tmp_path / "clean" / "run")
    assert (record["step"], record["continued_from"], record["skipped_rows"]) == (9, 6, [6 * ROWS, 9 * ROWS])


@pytest.mark.fault("spike")
def test_rollbacks_are_limited(tmp_path: Path) -> None:
    config = small_run(tmp_path, "rollback", spike={**SPIKE, "policy": "rollback", "max_rollbacks": 1})
    assert ended(1, config, {8 * PER_STEP: 20.0, 10 * PER_STEP: 20.0}) == [1]
    assert [record["action"] for record in spikes_of(tmp_path / "run")] == ["rollback"]
    assert CheckpointManifest.load(find_checkpoint(tmp_path / "run")).step == 6


@pytest.mark.fault("spike")
def test_a_spike_before_the_first_checkpoint_is_only_warned_of(tmp_path: Path) -> None:
    config = small_run(tmp_path, "rollback", train__steps=10, checkpoint={"every_steps": 20})
    assert ended(1, config, {8 * PER_STEP: 20.0}) == [0]
    (record,) = spikes_of(tmp_path / "run")
    assert (record["action"], record["reason"]) == ("warn", "there is no checkpoint to return to")
