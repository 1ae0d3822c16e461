"""Which implementation of the step's own kernels a run uses: Triton's on a GPU, or their plain twins in torch.

A twin is the definition; a Triton kernel must agree with it to the tolerance that its tests state. Triton's interpreter
runs the same kernels on a CPU, slowly: that is how they are tested where there is no GPU.
"""

from __future__ import annotations

from typing import Literal

import torch

from pretrain.errors import ConfigError

Kernels = Literal["triton", "torch"]
WantedKernels = Literal["auto", "triton", "torch"]


def choose_kernels(wanted: WantedKernels, device: torch.device) -> Kernels:
    """What `train.kernels` means on a device; `auto` is Triton on a GPU where it is installed.

    Raises:
        ConfigError: Triton is asked for where it cannot run.
    """
    if wanted == "torch" or (wanted == "auto" and device.type == "cpu"):
        return "torch"
    problem = triton_problem(device)
    if problem is None:
        return "triton"
    if wanted == "auto":
        return "torch"
    raise ConfigError(f"train.kernels=triton: {problem}; set train.kernels=auto or train.kernels=torch")


def triton_problem(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on a device; None if they can."""
    try:
        from triton import knobs
    except ImportError as error:
        return f"the package triton cannot be imported ({error})"
    if device.type == "cpu" and not knobs.runtime.interpret:
        return "there is no GPU, and Triton's interpreter (TRITON_INTERPRET=1) is off"
    return None
