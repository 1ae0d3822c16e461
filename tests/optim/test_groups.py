"""Parameter groups: who is decayed."""

from __future__ import annotations

import pytest
import torch

from pretrain.config.sections import OptimSection
from pretrain.optim import build_optimizer


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_biases_and_layer_norm_are_not_decayed(name: str) -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    section = OptimSection.model_validate({"name": name, "weight_decay": 0.25})
    decayed, plain = build_optimizer(model, section).param_groups
    assert (len(decayed["params"]), decayed["weight_decay"]) == (2, 0.25)
    assert (len(plain["params"]), plain["weight_decay"]) == (3, 0.0)
