"""The output of GELU, computed again in backward: less is kept, and no bit changes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.kernels.recompute import recomputed_for_backward


def _saved_elements(linear: nn.Module, hidden: Tensor, is_recomputed: bool) -> tuple[int, list[Tensor]]:
    """Elements that GELU and a product keep for backward, without parameters; output and gradients."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            saved[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    hidden = hidden.clone().requires_grad_()
    inner = hidden * 1  # what a product would have made
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        activated = F.gelu(inner)
        if is_recomputed:
            with recomputed_for_backward(activated, F.gelu, inner):
                out = linear(activated)
        else:
            out = linear(activated)
    gradients = torch.autograd.grad(out.square().sum(), [hidden, *linear.parameters()])
    weight = sum(n for place, n in saved.items() if place == linear.weight.untyped_storage().data_ptr())
    return sum(saved.values()) - weight, [out, *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_output_is_computed_again_with_the_same_bits(dtype: torch.dtype) -> None:
    linear, hidden = nn.Linear(16, 3).to(dtype), torch.randn(10, 16, dtype=dtype)
    num_kept, expected = _saved_elements(linear, hidden, is_recomputed=False)
    num_again, found = _saved_elements(linear, hidden, is_recomputed=True)
    assert (num_kept, num_again) == (320, 160)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
