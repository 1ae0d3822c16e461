"""AdamW (Loshchilov and Hutter 2019) over flat buffers.

Shape letters: N elements of a flat buffer, which holds many parameters one after the other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.optim.holdable import Holdable
from pretrain.optim.native_updates import UpdateKernels, native_adamw


def flat_adamw(
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
    gradient_scale: Tensor | None = None,
    skip: Tensor | None = None,
    kernels: UpdateKernels = "torch",
) -> None:
    """One AdamW update of a flat buffer, in place. Nothing is read back to the host of a GPU.

    Args:
        weight_N: fp32 weights, all on one device with the other tensors.
        gradient_N: their gradient, fp32, bf16 or fp16; may be overwritten.
        exp_avg_N, exp_avg_sq_N: fp32 moments.
        step: [] fp32, the number of updates so far; counted up.
        copy_N: the weights in the precision that the model computes with, or None: rounded from the new weights.
        gradient_scale: [] fp32 by which the gradient is multiplied first (clipping and loss scale); None: 1.
        skip: [] bool; if true, weights, moments and step stay as they are, whatever the gradient holds. None: false.
        kernels: who computes; "native", the C++ extension, on a CPU only.
    """
    update: Callable[..., None] = _torch_adamw
    if kernels == "triton":
        from pretrain.kernels.adamw import fused_adamw as update
    elif kernels == "native":
        update = native_adamw
    update(
        weight_N,
        gradient_N,
        exp_avg_N,
        exp_avg_sq_N,
        step,
        copy_N,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        gradient_scale=gradient_scale,
        skip=skip,
    )


def _torch_adamw(
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
    """The definition: torch's own fused kernel between a product and a copy."""
    if skip is not None and skip.device.type == "cpu" and skip:
        return
    gradient_N = gradient_N.float()
    if gradient_scale is not None:
        gradient_N.mul_(gradient_scale)
    found_inf = None if skip is None else skip.float()
    step.add_(1.0 if found_inf is None else 1.0 - found_inf)
    torch._fused_adamw_(
        [weight_N],
        [gradient_N],
        [exp_avg_N],
        [exp_avg_sq_N],
        [],
        [step],
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        found_inf=found_inf,
    )
    if copy_N is not None:
        copy_N.copy_(weight_N)


class AdamW(Holdable, torch.optim.AdamW):  # type: ignore[misc]  # torch types `step` by two overloads
    """torch's AdamW, whose step can be held, and which can update flat buffers in one pass.

    Its step is called without its wrapper, which loads TorchDynamo to end a compiled graph that does not exist.
    """

    _step = staticmethod(torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step)))
    kernels: UpdateKernels = "torch"

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """One update, unless the optimizer is held."""
        return None if self._is_held else self._step(self, *args, **kwargs)

    @torch.no_grad()
    def update_flat(
        self,
        gradients: Sequence[Tensor],
        copies: Sequence[Tensor | None],
        *,
        gradient_scale: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> None:
        """One update of every tensor of the parameter groups, in their order; `flat_adamw` explains the arguments.

        `gradients` are the tensors' gradients (their own `.grad` is not looked at), `copies` their 16-bit copies.
        """
        tensors = [(tensor, group) for group in self.param_groups for tensor in group["params"]]
        for (tensor, group), gradient, copy in zip(tensors, gradients, copies, strict=True):
            state = self.state[tensor]
            if not state:
                state["step"] = torch.zeros((), device=tensor.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(tensor), torch.zeros_like(tensor)
            flat_adamw(
                tensor.detach(),
                gradient,
                state["exp_avg"],
                state["exp_avg_sq"],
                state["step"],
                copy,
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                gradient_scale=gradient_scale,
                skip=skip,
                kernels=self.kernels,
            )
