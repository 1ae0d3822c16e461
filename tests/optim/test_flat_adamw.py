"""AdamW over flat buffers: torch's own, with the scale of the gradient, the skip and the 16-bit copy in one call."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pretrain.optim.adamw import AdamW, flat_adamw
from pretrain.optim.native_updates import UpdateKernels

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}


@pytest.mark.parametrize("gradient_type", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("copy_type", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kernels", "size"), [("torch", 1), ("torch", 4099), ("native", 77), ("native", 70_000)])
def test_flat_adamw_has_the_bits_of_torchs(
    size: int, gradient_type: torch.dtype, copy_type: torch.dtype, kernels: UpdateKernels
) -> None:
    torch.manual_seed(0)
    weight_N = torch.randn(size)
    parameter = torch.nn.Parameter(weight_N.clone())
    peer = torch.optim.AdamW([parameter], **SETTINGS, fused=True)
    exp_avg_N, exp_avg_sq_N, step = torch.zeros(size), torch.zeros(size), torch.zeros(())
    copy_N = torch.empty(size, dtype=copy_type)
    scale = torch.tensor(0.3)
    for _ in range(5):
        gradient_N = torch.randn(size).to(gradient_type)
        parameter.grad = gradient_N.float() * scale
        peer.step()
        state = weight_N, gradient_N, exp_avg_N, exp_avg_sq_N, step, copy_N
        flat_adamw(*state, **SETTINGS, gradient_scale=scale, kernels=kernels)
    expected = peer.state[parameter]
    # torch rounds what fills no register in another order.
    same = slice(size if kernels == "torch" else size // 16 * 16)
    for found, other in (
        (weight_N, parameter.detach()),
        (exp_avg_N, expected["exp_avg"]),
        (exp_avg_sq_N, expected["exp_avg_sq"]),
    ):
        assert torch.equal(found[same], other[same])
        assert torch.allclose(found, other, rtol=1e-6)
    assert torch.equal(copy_N, weight_N.to(copy_type))
    assert step == 5


def test_bf16_copies_are_rounded_to_the_nearest_with_ties_to_even() -> None:
    bits_N = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 1], dtype=torch.int32)
    weight_N = torch.cat([bits_N.view(torch.float32), torch.tensor([math.inf, -math.inf, math.nan, -0.0])])
    copy_N, zeros = torch.empty_like(weight_N, dtype=torch.bfloat16), torch.zeros(3, len(weight_N))
    flat_adamw(weight_N, *zeros, torch.zeros(()), copy_N, **{**SETTINGS, "weight_decay": 0.0}, kernels="native")
    assert torch.equal(copy_N.isnan(), weight_N.isnan())
    assert torch.equal(copy_N.nan_to_num(7.0), weight_N.bfloat16().nan_to_num(7.0))


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_a_skipped_update_changes_nothing(kernels: UpdateKernels) -> None:
    optimizer = AdamW([torch.nn.Parameter(torch.randn(9)), torch.nn.Parameter(torch.randn(4))], **SETTINGS)
    optimizer.kernels = kernels
    tensors = optimizer.param_groups[0]["params"]
    for skip in (False, True):
        copies = [torch.zeros_like(tensor, dtype=torch.bfloat16) for tensor in tensors]
        before = [tensor.detach().clone() for tensor in tensors]
        gradients = [torch.full_like(tensor, torch.nan if skip else 1.0) for tensor in tensors]
        optimizer.update_flat(gradients, copies, skip=torch.tensor(skip))
        for tensor, copy, old in zip(tensors, copies, before, strict=True):
            assert torch.equal(tensor, old) == skip
            assert torch.equal(copy, torch.zeros_like(copy) if skip else tensor.bfloat16())
        assert [float(optimizer.state[tensor]["step"]) for tensor in tensors] == [1.0, 1.0]
        assert all(bool(optimizer.state[tensor]["exp_avg"].isfinite().all()) for tensor in tensors)
