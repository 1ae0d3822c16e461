"""The norm of all gradients, and whether they are finite, from one number."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.optim.native_updates import UpdateKernels
from pretrain.optim.norms import squared_norm


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_no_size_loses_precision(kernels: UpdateKernels) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(size) * scale for size, scale in ((1, 3.0), (0, 1.0), (5001, 1e-3), (3_000_003, 1e-2))]
    tensors.append(torch.randn(70, 99).bfloat16())
    exact = sum(float(tensor.double().square().sum()) for tensor in tensors)
    assert float(squared_norm(tensors, kernels)) == pytest.approx(exact, rel=2e-7)
    assert squared_norm(tensors, kernels).dtype == torch.float64
    assert float(squared_norm([])) == 0


@pytest.mark.parametrize("value", [1e30, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 5000])
@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_it_is_finite_exactly_if_every_element_is(kernels: UpdateKernels, value: float, place: int) -> None:
    tensor_N = torch.ones(5001)
    tensor_N[place] = value
    assert math.isfinite(float(squared_norm([torch.ones(3), tensor_N], kernels))) == math.isfinite(value)
