"""Triton's AdamW and gradient norm against their plain twins, and against fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pretrain.optim.adamw import flat_adamw
from pretrain.optim.norms import squared_norm

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.1}


def fp64_adamw(state: list[torch.Tensor], gradient: torch.Tensor, step: int) -> None:
    """Loshchilov and Hutter 2019, algorithm 2, in place."""
    weight, mean, square = state
    mean.mul_(0.9).add_(0.1 * gradient)
    square.mul_(0.999).add_(0.001 * gradient**2)
    weight.mul_(1 - 1e-2 * 0.1)
    weight.sub_(1e-2 * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-6))


@pytest.mark.parametrize(
    ("size", "gradient_type", "copy_type", "num_steps"),
    [
        (1, torch.float32, torch.bfloat16, 5),
        pytest.param(777, torch.bfloat16, torch.bfloat16, 200, marks=pytest.mark.slow),
        (2049, torch.float16, torch.float16, 5),
        (4096, torch.float32, None, 5),
    ],
)
def test_adamw_equals_fp64(
    size: int, gradient_type: torch.dtype, copy_type: torch.dtype | None, num_steps: int, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_N = torch.randn(size, generator=generator).to(device)
    moments = [torch.zeros(size, device=device) for _ in range(2)]
    step = torch.zeros((), device=device)
    copy_N = None if copy_type is None else weight_N.to(copy_type)
    exact = [tensor.double() for tensor in (weight_N, *moments)]
    scale = torch.tensor(0.3, device=device)
    num_updates = 0
    for number in range(num_steps):
        gradient_N = (3 * torch.randn(size, generator=generator)).to(device, gradient_type)
        is_skipped = number % 50 == 3
        if is_skipped:
            gradient_N[0] = math.nan
        else:
            num_updates += 1
            fp64_adamw(exact, gradient_N.double() * 0.3, num_updates)
        flat_adamw(
            weight_N,
            gradient_N,
            *moments,
            step,
            copy_N,
            **SETTINGS,
            gradient_scale=scale,
            skip=torch.tensor(is_skipped, device=device),
            kernels="triton",
        )
        assert float(step) == num_updates
    for found, expected in zip((weight_N, *moments), exact, strict=True):
        assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-6)
    if copy_type is not None:
        assert torch.equal(copy_N, weight_N.to(copy_type))


def test_adamw_needs_neither_scale_nor_skip(device: torch.device) -> None:
    states = [[torch.ones(70, device=device), *torch.zeros(2, 70, device=device).unbind()] for _ in range(2)]
    for state, kernels in zip(states, ("torch", "triton"), strict=True):
        weight_N, *moments = state
        gradient_N = torch.linspace(-1, 1, 70, device=device)
        flat_adamw(weight_N, gradient_N, *moments, torch.zeros((), device=device), None, **SETTINGS, kernels=kernels)  # type: ignore[arg-type]
    for plain, fused in zip(*states, strict=True):
        assert torch.allclose(plain, fused, rtol=1e-6, atol=1e-7)


def test_copies_are_rounded_to_the_nearest_with_ties_to_even(device: torch.device) -> None:
    bits_N = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 1], dtype=torch.int32)
    weight_N = torch.cat([bits_N.view(torch.float32), torch.tensor([math.inf, -math.inf, math.nan, -0.0])]).to(device)
    copy_N = torch.empty_like(weight_N, dtype=torch.bfloat16)
    zeros = [torch.zeros_like(weight_N) for _ in range(3)]
    step = torch.zeros((), device=device)
    flat_adamw(weight_N, *zeros, step, copy_N, **{**SETTINGS, "weight_decay": 0.0}, kernels="triton")
    assert torch.equal(copy_N.isnan(), weight_N.isnan())
    assert torch.equal(copy_N.nan_to_num(7.0), weight_N.bfloat16().nan_to_num(7.0))


def test_the_norm_equals_fp64(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=generator).to(device) for size in (1, 0, 4097, 9001)]
    tensors.append(torch.randn(70, 3, generator=generator).to(device, torch.bfloat16))
    exact = sum(float(tensor.double().square().sum()) for tensor in tensors)
    assert float(squared_norm(tensors, "triton")) == pytest.approx(exact, rel=2e-7)


@pytest.mark.parametrize("value", [1e30, -3e38, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 5000])
def test_the_norm_is_finite_exactly_if_every_element_is(value: float, place: int, device: torch.device) -> None:
    tensor_N = torch.ones(5001, device=device)
    tensor_N[place] = value
    found = float(squared_norm([tensor_N], "triton"))
    assert math.isfinite(found) == math.isfinite(value)
    if math.isfinite(value):
        assert found == pytest.approx(float(tensor_N.double().square().sum()), rel=1e-6)
