"""The two halves of a LAMB step, by plain torch or by kernels; between them the ranks add up `squares_P2`.

Shape letters: N elements of a buffer, P parameters of this pipeline stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from pretrain.optim.native_updates import (
    UpdateKernels,
    native_lamb_moments,
    native_lamb_weights,
    step_settings,
)
from pretrain.optim.segments import SegmentTable


@dataclass(frozen=True)
class LambBuffer:
    """A flat buffer that LAMB updates, and its settings.

    Attributes:
        weight_N: fp32 weights (fp64 only without fused kernels), all on one device with the other tensors.
        gradient_N: their gradient, fp32, bf16 or fp16; may be overwritten.
        exp_avg_N, exp_avg_sq_N: moments.
        step: [] fp32, the number of updates.
        copy_N: the weights in the precision that the model computes with; None if the buffer itself is used.
        table: where the parameters are. What is in no segment is padding, whose weight and gradient are 0.
    """

    weight_N: Tensor
    gradient_N: Tensor
    exp_avg_N: Tensor
    exp_avg_sq_N: Tensor
    step: Tensor
    copy_N: Tensor | None
    table: SegmentTable
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def lamb_updates(
    buffers: Sequence[LambBuffer], squares_P2: Tensor, gradient_scale: Tensor | None
) -> list[list[Tensor]]:
    """The first half of a step of buffers with the same settings, as plain torch; it defines the others.

    Counts the step, updates the moments and writes the sums of the squares of weights and updates of each parameter
    that has a segment here to `squares_P2` (fp64).

    Returns:
        The updates of each buffer, before they are scaled, cut into segments.
    """
    beta1, beta2 = buffers[0].betas
    weights = [buffer.weight_N for buffer in buffers]
    gradients = [buffer.gradient_N.to(buffer.weight_N.dtype) for buffer in buffers]
    exp_avgs, exp_avg_sqs = [buffer.exp_avg_N for buffer in buffers], [buffer.exp_avg_sq_N for buffer in buffers]
    if gradient_scale is not None:
        torch._foreach_mul_(gradients, gradient_scale)
    steps = [buffer.step for buffer in buffers]
    torch._foreach_add_(steps, 1)
    torch._foreach_lerp_(exp_avgs, gradients, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, gradients, gradients, 1 - beta2)
    corrections = [list((1 - beta ** torch.stack(steps).double()).unbind()) for beta in (beta1, beta2)]
    updates = torch._foreach_div(exp_avgs, corrections[0])
    deviations = torch._foreach_div(exp_avg_sqs, corrections[1])
    torch._foreach_sqrt_(deviations)
    torch._foreach_add_(deviations, buffers[0].eps)
    torch._foreach_div_(updates, deviations)
    torch._foreach_add_(updates, weights, alpha=buffers[0].weight_decay)
    pieces = [buffer.table.split(update_N) for buffer, update_N in zip(buffers, updates, strict=True)]
    numbers = torch.cat([buffer.table.parameters for buffer in buffers]).to(squares_P2.device)
    if len(numbers):
        for column, parts in enumerate(([buffer.table.split(buffer.weight_N) for buffer in buffers], pieces)):
            norms = torch._foreach_norm(list(chain.from_iterable(parts)), 2, torch.float64)
            squares_P2[numbers, column] = torch.stack(norms).square()
    return pieces


def lamb_ratios(squares_P2: Tensor) -> Tensor:
    """[P] trust ratios, norm of the weight over norm of the update; 1 where one of them is 0."""
    weight_P, update_P = squares_P2.sqrt().unbind(1)
    return torch.where((weight_P > 0) & (update_P > 0), weight_P / update_P, 1.0)


def take_updates(buffers: Sequence[LambBuffer], updates: Sequence[list[Tensor]], squares_P2: Tensor) -> None:
    """The second half of a step, as plain torch; `squares_P2` holds the sums over all ranks by now."""
    numbers = torch.cat([buffer.table.parameters for buffer in buffers]).to(squares_P2.device)
    weights = list(chain.from_iterable(buffer.table.split(buffer.weight_N) for buffer in buffers))
    pieces = list(chain.from_iterable(updates))
    if pieces:
        rates = (lamb_ratios(squares_P2)[numbers] * buffers[0].lr).to(pieces[0].dtype)
        torch._foreach_mul_(pieces, list(rates.unbind()))
        torch._foreach_sub_(weights, pieces)
    for buffer in buffers:
        if buffer.copy_N is not None:
            buffer.copy_N.copy_(buffer.weight_N)


class LambStep:
    """One step of groups of buffers; the buffers of a group have the same settings.

    Args:
        squares_P2: fp64 zeros, on the buffers' device.
    """

    def __init__(self, groups: Sequence[Sequence[LambBuffer]], squares_P2: Tensor, kernels: UpdateKernels) -> None:
        self.groups = groups
        self.squares_P2 = squares_P2
        self.kernels = kernels
        self._is_skipped = False
        self._updates: list[list[list[Tensor]]] = []

    def take_first_half(self, gradient_scale: Tensor | None, skip: Tensor | None) -> None:
        """Update the moments, and write the squares of this rank's parts; with `skip` neither."""
        if self.kernels == "triton":
            from pretrain.kernels.lamb import fused_moments

            for buffer in self._buffers():
                fused_moments(
                    buffer.weight_N,
                    buffer.gradient_N,
                    *self._state(buffer),
                    self.squares_P2,
                    buffer.table.blocks(buffer.weight_N.device),
                    betas=buffer.betas,
                    eps=buffer.eps,
                    weight_decay=buffer.weight_decay,
                    gradient_scale=gradient_scale,
                    skip=skip,
                )
            return
        self._is_skipped = skip is not None and bool(skip)  # without a kernel of our own the host waits for the answer
        if self._is_skipped:
            return
        if self.kernels == "native":
            for buffer in self._buffers():
                buffer.step.add_(1)
                state = buffer.weight_N, buffer.gradient_N, buffer.exp_avg_N, buffer.exp_avg_sq_N
                settings = _settings(buffer, gradient_scale)
                squares_S2 = native_lamb_moments(*state, buffer.table.places, settings)
                self.squares_P2[buffer.table.parameters] = squares_S2
        else:
            self._updates = [lamb_updates(buffers, self.squares_P2, gradient_scale) for buffers in self.groups]

    def take_second_half(self, skip: Tensor | None) -> None:
        """Update the weights, once `squares_P2` holds the sums over all ranks."""
        if self.kernels == "triton":
            from pretrain.kernels.lamb import fused_weights

            for buffer in self._buffers():
                fused_weights(
                    buffer.weight_N,
                    *self._state(buffer),
                    buffer.copy_N,
                    self.squares_P2,
                    buffer.table.blocks(buffer.weight_N.device),
                    lr=buffer.lr,
                    betas=buffer.betas,
                    eps=buffer.eps,
                    weight_decay=buffer.weight_decay,
                    skip=skip,
                )
        elif self._is_skipped:
            return
        elif self.kernels == "native":
            ratio_P = lamb_ratios(self.squares_P2)
            for buffer in self._buffers():
                state = buffer.weight_N, buffer.exp_avg_N, buffer.exp_avg_sq_N
                rate_S = ratio_P[buffer.table.parameters] * buffer.lr
                native_lamb_weights(*state, buffer.copy_N, buffer.table.places, rate_S, _settings(buffer, None))
        else:
            for buffers, updates in zip(self.groups, self._updates, strict=True):
                take_updates(buffers, updates, self.squares_P2)

    def _buffers(self) -> Iterator[LambBuffer]:
        return chain.from_iterable(self.groups)

    @staticmethod
    def _state(buffer: LambBuffer) -> tuple[Tensor, Tensor, Tensor]:
        return buffer.exp_avg_N, buffer.exp_avg_sq_N, buffer.step


def _settings(buffer: LambBuffer, gradient_scale: Tensor | None) -> dict[str, float]:
    return step_settings(buffer.step, buffer.betas, buffer.eps, buffer.weight_decay, gradient_scale)
