"""Builds the optimizer of a run, and its state."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as distributed

from pretrain.config.deepspeed import zero_stage
from pretrain.config.sections import OptimSection, RunConfig
from pretrain.data.native import native
from pretrain.kernels.choice import choose_kernels
from pretrain.optim.adamw import AdamW
from pretrain.optim.groups import parameter_groups
from pretrain.optim.lamb import Lamb
from pretrain.optim.native_updates import UpdateKernels


def build_optimizer(
    model: torch.nn.Module,
    optim: OptimSection,
    *,
    norm_group: distributed.ProcessGroup | None = None,
    adds_whole: bool = True,
    kernels: UpdateKernels = "torch",
) -> AdamW | Lamb:
    """AdamW or LAMB over the model's parameters, on whichever device ZeRO keeps the state.

    Args:
        norm_group, adds_whole: see `Lamb`.
        kernels: who updates flat buffers; see `choose_update_kernels`.
    """
    groups = parameter_groups(model, optim.weight_decay)
    settings: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
    optimizer: AdamW | Lamb
    if optim.name == "lamb":
        optimizer = Lamb(groups, **settings, norm_group=norm_group, adds_whole=adds_whole)
    else:
        # One fused kernel per step instead of several passes over all state; torch has it for CPU and CUDA.
        optimizer = AdamW(groups, **settings, fused=True)
    optimizer.kernels = kernels
    return optimizer


def choose_update_kernels(config: RunConfig, device: torch.device) -> UpdateKernels:
    """Who updates the optimizer's state of a run that computes on `device`.

    Triton works on the buffers of a GPU, the C++ extension on those of a CPU, unless `train.kernels=torch`. On a GPU
    without ZeRO there are no buffers, but as many tensors as parameters, which torch's foreach functions update in
    fewer launches.
    """
    kernels = choose_kernels(config.train.kernels, device)
    is_on_cpu = device.type == "cpu" or config.zero.offload_optimizer.device != "none"
    if is_on_cpu and not (kernels == "triton" and device.type == "cpu"):
        return "native" if config.train.kernels != "torch" and native().can_update_buffers() else "torch"
    return kernels if zero_stage(config) > 0 else "torch"


def initial_state(optimizer: torch.optim.Optimizer, tensor: torch.Tensor, num_steps: int) -> dict[str, Any]:
    """State of a tensor that was updated `num_steps` times, with moments that are still to be filled in (zeros)."""
    moments = {kind: torch.zeros_like(tensor, requires_grad=False) for kind in ("exp_avg", "exp_avg_sq")}
    if isinstance(optimizer, AdamW | Lamb):  # on the device, where fused kernels read it
        return {"step": torch.tensor(float(num_steps), dtype=torch.float32, device=tensor.device), **moments}
    return {"step": num_steps, **moments}  # DeepSpeed's Adams count in Python
