"""AdamW over flat buffers: torch's own, with the scale of the gradient, the skip and the 16-bit copy in one call."""

from __future__ import annotations

import pytest
import torch

from pretrain.optim.adamw import AdamW, flat_adamw

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}


@pytest.mark.parametrize("gradient_type", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 77, 4099])
def test_flat_adamw_has_the_bits_of_torchs(size: int, gradient_type: torch.dtype) -> None:
    torch.manual_seed(0)
    weight_N = torch.randn(size)
    parameter = torch.nn.Parameter(weight_N.clone())
    peer = torch.optim.AdamW([parameter], **SETTINGS, fused=True)  # type: ignore[arg-type]
    exp_avg_N, exp_avg_sq_N, step = torch.zeros(size), torch.zeros(size), torch.zeros(())
    copy_N = torch.empty(size, dtype=torch.bfloat16)
    scale = torch.tensor(0.3)
    for _ in range(5):
        gradient_N = torch.randn(size).to(gradient_type)
        parameter.grad = gradient_N.float() * scale
        peer.step()
        flat_adamw(weight_N, gradient_N, exp_avg_N, exp_avg_sq_N, step, copy_N, **SETTINGS, gradient_scale=scale)  # type: ignore[arg-type]
    state = peer.state[parameter]
    assert torch.equal(weight_N, parameter.detach())
    assert torch.equal(exp_avg_N, state["exp_avg"])
    assert torch.equal(exp_avg_sq_N, state["exp_avg_sq"])
    assert torch.equal(copy_N, weight_N.bfloat16())
    assert step == 5


def test_a_skipped_update_changes_nothing() -> None:
    optimizer = AdamW([torch.nn.Parameter(torch.randn(9)), torch.nn.Parameter(torch.randn(4))], **SETTINGS)  # type: ignore[arg-type]
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
