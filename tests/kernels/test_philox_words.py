"""Triton draws the bits of the definition, and drops by them."""

from __future__ import annotations

import pytest
import torch

from pretrain.kernels.dropout import dropout
from pretrain.kernels.dropout_mask import HiddenDropout
from pretrain.model.dropout import AFTER_ATTENTION, DropoutKey


@pytest.mark.parametrize("width", [1, 8, 12, 100])
@pytest.mark.parametrize("first_line", [0, 2**38])
def test_triton_drops_what_torch_drops(width: int, first_line: int, device: torch.device) -> None:
    hidden = (torch.rand(6, width, device=device) + 1).requires_grad_()
    words = DropoutKey.of(2**64 - 1, 2**40, 3, device).at(4)[AFTER_ATTENTION]
    for line_N in (None, torch.tensor([5, 2**37, 0, 1, 5, 9], device=device)):
        drop = HiddenDropout(0.4, words, first_line, line_N)
        found, expected = dropout(hidden, drop, "triton"), drop.apply(hidden)
        assert torch.equal(found, expected)
        slope = torch.rand_like(hidden)
        assert torch.equal(*(torch.autograd.grad(out, hidden, slope)[0] for out in (found, expected)))
