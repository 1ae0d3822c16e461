"""What a step does with its gradients, from the one sum of their squares: update, clip or skip.

DeepSpeed asks every parameter by itself whether it is finite and how long it is, which costs more kernels than the
backward pass of the model. One sum of squares answers both: it is finite if every gradient is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Verdict(NamedTuple):
    """Tensors without dimensions, on the device or, once the sum has been read back, on the host.

    Attributes:
        norm: of the gradients as they are, multiplied by the loss scale; fp32.
        scale: by which the optimizer multiplies them, to take the loss scale out and to clip them; fp32.
        skip: whether a gradient is not finite, so that nothing may change; bool.
    """

    norm: Tensor
    scale: Tensor
    skip: Tensor


def judge(squares: Tensor, *, loss_scale: float, max_norm: float) -> Verdict:
    """The verdict over gradients whose sum of squares is `squares`, fp64; `max_norm` 0 does not clip.

    As in DeepSpeed, a sum beyond fp32 counts as not finite, and the norm that is clipped to is larger by 1e-6.
    """
    norm = squares.float().sqrt()
    divisor = torch.full_like(norm, loss_scale)
    if max_norm > 0:
        divisor = divisor * ((norm / loss_scale + 1e-6) / max_norm).clamp(min=1.0)
    return Verdict(norm, 1.0 / divisor, torch.isfinite(norm).logical_not())
