"""Schedules as functions, parameter groups, and LAMB against a plain transcription of the paper."""

from __future__ import annotations

import pytest
import torch

from pretrain.config.sections import OptimSection
from pretrain.optim import Lamb, build_optimizer, learning_rate, parameter_groups


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


def small_model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))


def test_biases_and_layer_norm_are_not_decayed() -> None:
    decayed, plain = parameter_groups(small_model(), 0.25, one_each=False)
    assert (len(decayed["params"]), decayed["weight_decay"]) == (2, 0.25)
    assert (len(plain["params"]), plain["weight_decay"]) == (3, 0.0)


def test_lamb_gets_one_group_per_parameter() -> None:
    optimizer = build_optimizer(small_model(), section(name="lamb", weight_decay=0.5), shard_group=None)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1] * 5
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.5, 0.0, 0.0, 0.0]


def test_lamb_equals_the_papers_algorithm() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 4, dtype=torch.float64)
    gradients = [torch.randn(3, 4, dtype=torch.float64) for _ in range(4)]
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = Lamb([parameter], lr=0.1, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.02)
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, gradient in enumerate(gradients, 1):
        parameter.grad = gradient.clone()
        optimizer.step()
        # You et al. 2020, algorithm 2, line by line.
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.99 * square + 0.01 * gradient**2
        ratio = (mean / (1 - 0.9**step)) / ((square / (1 - 0.99**step)).sqrt() + 1e-6)
        update = ratio + 0.02 * weight
        weight = weight - 0.1 * (weight.norm() / update.norm()) * update
        assert torch.allclose(parameter.detach(), weight, rtol=1e-6, atol=0)


def test_lamb_takes_a_plain_step_where_the_weight_is_zero() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    Lamb([parameter], lr=0.1).step()
    assert torch.allclose(parameter.detach(), torch.full((3,), -0.1), atol=1e-5)
