"""Updates of flat buffers on a CPU by the C++ extension (`csrc/include/taco/optimizer.hpp`), in one pass over memory.

Shape letters: N elements of a buffer, S segments.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pretrain.data.native import native
from pretrain.kernels.choice import Kernels

UpdateKernels = Kernels | Literal["native"]


def native_adamw(
    weight_N: Tensor,
    gradient_N: Tensor,
    exp_avg_N: Tensor,
    exp_avg_sq_N: Tensor,
    step: Tensor,
    copy_N: Tensor | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    gradient_scale: Tensor | None,
    skip: Tensor | None,
) -> None:
    """`flat_adamw` of fp32 state on a CPU, with the bits of its definition but for the last elements of a buffer.

    torch rounds the second moment of those that fill no vector register in another order.
    """
    if skip is not None and skip:
        return
    step.add_(1)
    settings = step_settings(step, betas, eps, weight_decay, gradient_scale)
    arrays = [as_array(tensor) for tensor in (weight_N, gradient_N.contiguous(), exp_avg_N, exp_avg_sq_N)]
    native().adamw(*arrays, _copy_array(copy_N), lr=lr, settings=settings, num_threads=torch.get_num_threads())
    finish_copy(copy_N, weight_N)


def native_squares(tensor: Tensor) -> float:
    """The sum of the squares of a tensor on a CPU, in fp64."""
    return float(native().sum_squares(as_array(tensor), num_threads=torch.get_num_threads()))


def native_lamb_moments(
    weight_N: Tensor,
    gradient_N: Tensor,
    exp_avg_N: Tensor,
    exp_avg_sq_N: Tensor,
    segments: tuple[np.ndarray, np.ndarray],
    settings: dict[str, float],
) -> Tensor:
    """Updates the moments; returns [S, 2] fp64, the squares of weights and updates of each segment."""
    arrays = [as_array(tensor) for tensor in (weight_N, gradient_N.contiguous(), exp_avg_N, exp_avg_sq_N)]
    squares_S2 = native().lamb_moments(*arrays, *segments, settings=settings, num_threads=torch.get_num_threads())
    return torch.from_numpy(squares_S2)


def native_lamb_weights(
    weight_N: Tensor,
    exp_avg_N: Tensor,
    exp_avg_sq_N: Tensor,
    copy_N: Tensor | None,
    segments: tuple[np.ndarray, np.ndarray],
    rate_S: Tensor,
    settings: dict[str, float],
) -> None:
    """Takes the updates of each segment times its rate (fp64)."""
    arrays = [as_array(tensor) for tensor in (weight_N, exp_avg_N, exp_avg_sq_N)]
    copy = _copy_array(copy_N)
    native().lamb_weights(
        *arrays, copy, *segments, rate_S.numpy(), settings=settings, num_threads=torch.get_num_threads()
    )
    finish_copy(copy_N, weight_N)


def step_settings(
    step: Tensor, betas: tuple[float, float], eps: float, weight_decay: float, gradient_scale: Tensor | None
) -> dict[str, float]:
    """The numbers of update `step` as C++ takes them."""
    return {
        "beta1": betas[0],
        "beta2": betas[1],
        "eps": eps,
        "weight_decay": weight_decay,
        "step": float(step),
        "gradient_scale": 1.0 if gradient_scale is None else float(gradient_scale),
    }


def as_array(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor as a vector: fp32, or bf16 as uint16; fp16 is converted."""
    flat = tensor.detach().view(-1)  # never a copy: what C++ writes must arrive
    if flat.dtype == torch.bfloat16:
        return flat.view(torch.uint16).numpy()
    return flat.float().numpy()


def _copy_array(copy_N: Tensor | None) -> Any:
    return None if copy_N is None or copy_N.dtype == torch.float16 else as_array(copy_N)


def finish_copy(copy_N: Tensor | None, weight_N: Tensor) -> None:
    """Write a copy that C++ does not write."""
    if copy_N is not None and copy_N.dtype == torch.float16:
        copy_N.copy_(weight_N)
