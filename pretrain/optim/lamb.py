"""LAMB (You et al. 2020, algorithm 2), exact where ZeRO and tensor parallelism split the parameters.

A step has two halves with one collective between them: the first updates the moments and adds up the squares of weights
and updates per parameter; the second takes the step of each parameter by the ratio of its two norms.

Shape letters: P parameters of this pipeline stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import torch
import torch.distributed as distributed
from torch import Tensor

from pretrain.optim.holdable import Holdable
from pretrain.optim.lamb_halves import LambBuffer, LambStep
from pretrain.optim.native_updates import UpdateKernels
from pretrain.optim.segments import Segment, SegmentTable

# The tensors of a parameter group, each with its gradient and its copy.
_Inputs = list[tuple[Tensor, Tensor | None, Tensor | None]]


class _LambUpdate(torch.optim.Optimizer):
    """LAMB over whole parameters or over ZeRO's buffers.

    ZeRO hands an optimizer flat slices, over which a trust ratio per layer would silently become a ratio per slice. So
    `set_segments` says which parameters are where, and the squares of each parameter's parts are summed over
    `norm_group`: once per step, or once per sub-group of parameters where DeepSpeed steps each by itself (ZeRO-3,
    offload).

    Args:
        norm_group: the ranks that hold parts of this rank's parameters; None if this rank has all of each.
        adds_whole: whether this rank adds the parameters that tensor parallelism does not split: all ranks of a
            tensor-parallel group hold those, so one of them does.
    """

    kernels: UpdateKernels = "torch"

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        norm_group: distributed.ProcessGroup | None = None,
        adds_whole: bool = True,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.norm_group = norm_group
        self.adds_whole = adds_whole
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        self.set_segments(
            {tensor: [Segment(number, 0, tensor.numel())] for number, tensor in enumerate(tensors)},
            [False] * len(tensors),
        )

    def set_segments(self, segments: Mapping[Tensor, Sequence[Segment]], is_split: Sequence[bool]) -> None:
        """Say where the parameters are, once ZeRO has replaced them by its buffers.

        Args:
            segments: of each tensor that this optimizer will update.
            is_split: of each parameter by its number, whether tensor parallelism splits it. All ranks of `norm_group`
                number the same parameters.
        """
        self._tables = {tensor: SegmentTable(found, tensor.numel()) for tensor, found in segments.items()}
        self._is_split_P = torch.tensor(is_split, dtype=torch.bool)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        self._update([[(tensor, tensor.grad, None) for tensor in group["params"]] for group in self.param_groups])
        return loss

    @torch.no_grad()
    def update_flat(
        self,
        gradients: Sequence[Tensor],
        copies: Sequence[Tensor | None],
        *,
        gradient_scale: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> None:
        """One update of every tensor of the parameter groups, in their order; collective over `norm_group`.

        Args:
            gradients: of the tensors (their own `.grad` is not looked at), fp32 or 16-bit; may be overwritten.
            copies: the weights in the precision that the model computes with, written in the same pass, or None.
            gradient_scale: [] fp32 by which gradients are multiplied first; None: 1.
            skip: [] bool, the same on all ranks: if true, nothing changes, whatever the gradients hold.
        """
        rest = iter(zip(gradients, copies, strict=True))
        found: list[_Inputs] = [[(tensor, *next(rest)) for tensor in group["params"]] for group in self.param_groups]
        self._update(found, gradient_scale, skip)

    def _update(
        self,
        found: list[_Inputs],
        gradient_scale: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> None:
        """One update of the tensors of each group, each with its gradient and its copy."""
        groups = [
            [
                self._buffer(tensor, gradient, copy, settings)
                for tensor, gradient, copy in tensors
                if gradient is not None
            ]
            for tensors, settings in zip(found, self.param_groups, strict=True)
        ]
        groups = [buffers for buffers in groups if buffers]
        device = groups[0][0].weight_N.device if groups else None
        squares_P2 = torch.zeros(len(self._is_split_P), 2, dtype=torch.float64, device=device)
        step = LambStep(groups, squares_P2, self.kernels)
        step.take_first_half(gradient_scale, skip)
        self._sum_over_ranks(squares_P2)
        step.take_second_half(skip)

    def _buffer(self, tensor: Tensor, gradient: Tensor, copy: Tensor | None, settings: dict[str, Any]) -> LambBuffer:
        state = self.state[tensor]
        if not state:
            state["step"] = torch.zeros((), device=tensor.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(tensor), torch.zeros_like(tensor)
        names = ("lr", "betas", "eps", "weight_decay")
        return LambBuffer(
            tensor,
            gradient,
            state["exp_avg"],
            state["exp_avg_sq"],
            state["step"],
            copy,
            self._tables[tensor],
            **{name: settings[name] for name in names},
        )

    def _sum_over_ranks(self, squares_P2: Tensor) -> None:
        """Sum in place what the ranks of `norm_group` found about each parameter."""
        if self.norm_group is None:
            return
        if not self.adds_whole:
            squares_P2.mul_(self._is_split_P.to(squares_P2.device)[:, None])
        distributed.all_reduce(squares_P2, group=self.norm_group)


class Lamb(Holdable, _LambUpdate):  # type: ignore[misc]
    """LAMB, whose step can be held."""
