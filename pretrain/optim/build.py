"""Builds the optimizer of a run, and its state."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as distributed

from pretrain.config.sections import OptimSection
from pretrain.optim.adamw import AdamW
from pretrain.optim.groups import parameter_groups
from pretrain.optim.lamb import Lamb


def build_optimizer(
    model: torch.nn.Module,
    optim: OptimSection,
    *,
    shard_group: distributed.ProcessGroup | None,
    tensor_group: distributed.ProcessGroup | None = None,
) -> AdamW | Lamb:
    """AdamW or LAMB over the model's parameters, on whichever device ZeRO keeps the state.

    `shard_group` is the group over which ZeRO will split each parameter group, `tensor_group` the one whose ranks hold
    parts of the tensor-parallel parameters; None if nothing is split.
    """
    groups = parameter_groups(model, optim.weight_decay, one_each=optim.name == "lamb")
    if optim.name == "lamb":
        return Lamb(
            groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, shard_group=shard_group, tensor_group=tensor_group
        )
    # One fused kernel per step instead of several passes over all state; torch has it for CPU and CUDA.
    return AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def initial_state(optimizer: torch.optim.Optimizer, tensor: torch.Tensor, num_steps: int) -> dict[str, Any]:
    """State of a tensor that was updated `num_steps` times, with moments that are still to be filled in (zeros)."""
    moments = {kind: torch.zeros_like(tensor, requires_grad=False) for kind in ("exp_avg", "exp_avg_sq")}
    if isinstance(optimizer, torch.optim.AdamW):
        step: Any = torch.tensor(
            float(num_steps), dtype=torch.float32, device=tensor.device
        )  # fused kernels need it there
    elif isinstance(optimizer, Lamb):
        step = torch.tensor(float(num_steps), dtype=torch.float32)
    else:  # DeepSpeed's Adams count in Python
        step = num_steps
    return {"step": step, **moments}
