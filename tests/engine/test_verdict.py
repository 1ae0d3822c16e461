"""What a step does with its gradients, from the sum of their squares."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.engine.verdict import judge


def squares_of(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).square().sum()


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
@pytest.mark.parametrize(("max_norm", "clipped"), [(0.0, 1.0), (1.0, 0.2), (10.0, 1.0)])
def test_gradients_are_unscaled_and_clipped(loss_scale: float, max_norm: float, clipped: float) -> None:
    verdict = judge(squares_of(3 * loss_scale, 4 * loss_scale), loss_scale=loss_scale, max_norm=max_norm)
    assert not bool(verdict.skip)
    assert float(verdict.norm) == 5 * loss_scale
    assert float(verdict.scale) == pytest.approx(clipped / loss_scale, rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e20])
def test_a_sum_that_is_not_finite_in_fp32_skips_the_step(value: float) -> None:
    assert bool(judge(squares_of(1.0, value), loss_scale=1.0, max_norm=1.0).skip)
