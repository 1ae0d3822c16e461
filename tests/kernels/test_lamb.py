"""Triton's LAMB against its plain twin, which `tests/optim/test_flat_lamb.py` holds against the paper."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pretrain.optim import Lamb
from pretrain.optim.segments import Segment

SETTINGS: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.02}
# One element, less than a block, whole blocks, several blocks; padding before, between and behind.
LENGTHS = (1, 77, 4096, 2049, 5000)


def optimizer(device: torch.device, kernels: str, lengths: tuple[int, ...] = LENGTHS) -> tuple[Lamb, torch.Tensor]:
    """LAMB over one buffer of parameters of these lengths; the third one is zero."""
    generator = torch.Generator().manual_seed(0)
    start, segments = 3, []
    buffer = torch.zeros(3 + sum(lengths) + 2 * len(lengths) + 5)
    for number, length in enumerate(lengths):
        segments.append(Segment(number, start, length))
        if number != 2:
            buffer[start : start + length] = torch.randn(length, generator=generator)
        start += length + 2
    parameter = torch.nn.Parameter(buffer.to(device))
    found = Lamb([parameter], **SETTINGS)
    found.set_segments({parameter: segments}, [False] * len(lengths))
    found.kernels = kernels  # type: ignore[assignment]
    return found, parameter


@pytest.mark.parametrize(
    ("lengths", "gradient_type", "num_steps"), [(LENGTHS, torch.float32, 5), ((5, 300), torch.bfloat16, 40)]
)
@pytest.mark.slow
def test_lamb_equals_its_twin(
    lengths: tuple[int, ...], gradient_type: torch.dtype, num_steps: int, device: torch.device
) -> None:
    pairs = [optimizer(device, kernels, lengths) for kernels in ("torch", "triton")]
    copies = [torch.zeros_like(parameter, dtype=torch.bfloat16) for _, parameter in pairs]
    scale = torch.tensor(0.5, device=device)
    generator = torch.Generator().manual_seed(1)
    is_padding = pairs[0][1].detach() == 0
    for start, length in ((piece.start, piece.length) for piece in pairs[0][0]._tables[pairs[0][1]].segments):
        is_padding[start : start + length] = False
    for number in range(num_steps):
        gradient = torch.randn(len(is_padding), generator=generator).to(device, gradient_type)
        gradient[is_padding] = 0
        is_skipped = number % 20 == 3
        if is_skipped:
            gradient[7] = math.nan
        for (lamb, _), copy in zip(pairs, copies, strict=True):
            skip = torch.tensor(is_skipped, device=device)
            lamb.update_flat([gradient.clone()], [copy], gradient_scale=scale, skip=skip)
    (plain, plain_weight), (fused, fused_weight) = pairs
    assert torch.allclose(fused_weight.detach(), plain_weight.detach(), rtol=1e-4, atol=2e-5)
    for name in ("exp_avg", "exp_avg_sq", "step"):
        assert torch.allclose(fused.state[fused_weight][name], plain.state[plain_weight][name], rtol=1e-5, atol=1e-7)
    assert torch.equal(copies[1], fused_weight.detach().bfloat16())
    assert not fused_weight.detach()[is_padding].any()


def test_lamb_steps_buffers_without_scale_skip_or_copy(device: torch.device) -> None:
    pairs = [optimizer(device, kernels) for kernels in ("torch", "triton")]
    for lamb, parameter in pairs:
        parameter.grad = torch.full_like(parameter, 0.1)
        lamb.step()
        empty = torch.nn.Parameter(torch.zeros(4, device=device))
        lamb.set_segments({empty: []}, [])
        lamb.param_groups[0]["params"], empty.grad = [empty], torch.ones_like(empty)
        lamb.step()
    for segment in pairs[0][0]._tables.values():
        assert segment.segments == ()
    assert torch.allclose(pairs[0][1].detach()[3:4], pairs[1][1].detach()[3:4], rtol=1e-5)
    assert torch.allclose(pairs[0][1].detach()[6:83], pairs[1][1].detach()[6:83], rtol=1e-5, atol=1e-6)
