"""Which parameters are decayed, and the parameter groups of an optimizer."""

from __future__ import annotations

from typing import Any

import torch


def is_decayed(name: str, parameter: torch.Tensor) -> bool:
    """True for matrices and embeddings; biases and LayerNorm are not decayed (the BERT authors' optimization.py)."""
    return parameter.dim() >= 2 and not name.endswith("bias")


def is_tensor_parallel(parameter: torch.Tensor) -> bool:
    """True if each tensor-parallel rank holds a different part of the parameter."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters with and without weight decay."""
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if is_decayed(name, parameter) else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
