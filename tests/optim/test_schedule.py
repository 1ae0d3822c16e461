"""Learning-rate schedules as functions of the step."""

from __future__ import annotations

import pytest

from pretrain.config.sections import OptimSection
from pretrain.optim.schedule import learning_rate


def section(**values: object) -> OptimSection:
    return OptimSection.model_validate({"lr": 1.0, "warmup_steps": 10, **values})


def test_warm_up_is_linear_and_never_zero() -> None:
    rates = [learning_rate(step, section(), 100) for step in range(10)]
    assert rates == pytest.approx([(i + 1) / 10 for i in range(10)])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_schedules_start_at_the_peak_end_at_the_floor_and_never_rise(schedule: str) -> None:
    optim = section(schedule=schedule, min_lr_ratio=0.1)
    rates = [learning_rate(step, optim, 100) for step in range(10, 101)]
    assert rates[0] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1)
    assert all(later <= earlier + 1e-12 for earlier, later in zip(rates, rates[1:], strict=False))


def test_shapes_of_the_schedules() -> None:
    assert learning_rate(55, section(schedule="linear"), 100) == pytest.approx(0.5)
    assert learning_rate(55, section(schedule="cosine"), 100) == pytest.approx(0.5)
    wsd = section(schedule="wsd", decay_steps=20)
    assert [learning_rate(step, wsd, 100) for step in (50, 80, 90)] == pytest.approx([1.0, 1.0, 0.5])


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    assert learning_rate(0, section(warmup_steps=0), 100) == 1.0
