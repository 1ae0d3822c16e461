"""When a loss is a spike; tests/faults/test_loss_spikes.py has what happens then."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict
from pathlib import Path

import pytest

from pretrain.config.checks import check_config
from pretrain.config.sections import RunConfig, SpikeSection
from pretrain.resilience.spikes import Spikes, TooManySpikesError

WINDOW = 8
LOSSES = [4.0, 4.2, 3.9, 4.1, 4.05, 3.95, 4.1, 4.0]


def spikes(folder: Path, **changes: object) -> Spikes:
    return Spikes(SpikeSection.model_validate({"window": WINDOW, "sigmas": 5.0} | changes), folder)


def fed(folder: Path, losses: list[float], **changes: object) -> Spikes:
    found = spikes(folder, **changes)
    for loss in losses:
        found.add(loss)
    return found


def test_nothing_is_a_spike_before_the_window_is_full(tmp_path: Path) -> None:
    assert fed(tmp_path, LOSSES[:-1]).bound == math.inf
    expected = statistics.mean(LOSSES) + 5 * statistics.pstdev(LOSSES)
    found = fed(tmp_path, LOSSES)
    assert found.bound == pytest.approx(expected)
    assert found.is_spike(expected + 0.01)
    assert not found.is_spike(expected - 0.01)
    assert fed(tmp_path, LOSSES, policy="off").bound == math.inf


def test_losses_that_are_no_numbers_are_no_spikes(tmp_path: Path) -> None:
    found = fed(tmp_path, [*LOSSES, math.nan, math.inf])
    assert found.bound == fed(tmp_path, LOSSES).bound
    assert not found.is_spike(math.nan)
    assert not found.is_spike(math.inf)


def test_a_smooth_run_has_a_least_deviation(tmp_path: Path) -> None:
    assert fed(tmp_path, [4.0] * WINDOW).bound == pytest.approx(4.0 + 5 * 0.04)


def test_one_wild_loss_moves_the_bound_little_and_a_new_level_becomes_normal(tmp_path: Path) -> None:
    assert fed(tmp_path, [*LOSSES, 4000.0]).bound == fed(tmp_path, [*LOSSES, fed(tmp_path, LOSSES).bound]).bound
    found = fed(tmp_path, LOSSES)
    for _ in range(40):
        found.add(6.0)
    assert not found.is_spike(6.0)


def test_a_falling_loss_is_no_spike(tmp_path: Path) -> None:
    found = spikes(tmp_path)
    for step in range(300):
        loss = 10 / (1 + step / 20)
        assert not found.is_spike(loss)
        found.add(loss)


def test_what_a_checkpoint_keeps_decides_alike(tmp_path: Path) -> None:
    found, again = fed(tmp_path, LOSSES), spikes(tmp_path)
    again.restore(json.loads(json.dumps(asdict(found.history))))
    assert again.history == found.history
    again.restore({})  # of a checkpoint that has no such account
    assert again.bound == math.inf


def test_rollbacks_are_counted_beyond_the_checkpoint_and_limited(tmp_path: Path) -> None:
    found = fed(tmp_path, LOSSES, max_rollbacks=2)
    saved = asdict(found.history)
    found.add(5.0)
    for number, span in enumerate([(0, 32), (32, 48)], start=1):
        found.check_limit(3, 40.0)
        found.roll_back(saved, span)
        assert found.history.num_rollbacks == number
        assert found.history.num_steps == WINDOW
    assert found.history.skipped_rows == [[0, 32], [32, 48]]
    with pytest.raises(TooManySpikesError, match=r"step 3: loss 40.0000 .* rolled back 2 times already"):
        found.check_limit(3, 40.0)


def test_a_rollback_without_checkpoints_is_refused() -> None:
    tree = {"run": {"output_dir": "x"}, "data": {"train": ["x"]}, "spike": {"policy": "rollback"}}
    assert check_config(RunConfig.model_validate(tree)) == []
    (problem,) = check_config(RunConfig.model_validate(tree | {"checkpoint": {"every_steps": None}}))
    assert "set checkpoint.every_steps, or spike.policy=warn" in problem
