"""DeepSpeed's own step, with one answer to all of its questions: ZeRO-3, and offloaded optimizer state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pretrain.engine.step_report import Report
from pretrain.engine.update import Update, require, weighed_squares
from pretrain.engine.zero_state import ZeroState
from pretrain.optim import Holdable, squared_norm
from pretrain.parallel.mesh import Mesh


class AnsweredUpdate(Update):
    """DeepSpeed's own step, where parameters are split (ZeRO-3) or optimizer state is in the host's memory."""

    def __init__(self, engine: Any, state: ZeroState, hold: Holdable, mesh: Mesh, max_norm: float) -> None:
        super().__init__(engine, state, hold, mesh, max_norm)
        wrapper = self.wrapper
        self._is_stage_3 = hasattr(wrapper, "fp16_partitioned_groups_flat")
        self._is_offloaded = bool(wrapper.offload_optimizer if self._is_stage_3 else wrapper.cpu_offload)
        require(wrapper, "has_overflow", "norm_for_param_grads" if self._is_offloaded else "averaged_gradients")
        wrapper.has_overflow = lambda partition_gradients=True: bool(self._given.skip)
        if self._is_stage_3:
            require(wrapper, "_get_norm_groups", "_constant_buffered_norm2")
            wrapper._get_norm_groups = lambda: [self._given.norm]
            wrapper._constant_buffered_norm2 = lambda gradient, buffer_size=0: squared_norm([gradient]).sqrt()
        else:
            require(wrapper, "scaled_global_norm", "set_norm_for_param_grad_in_gpu", "update_offload_overflow_tracker")
            wrapper.scaled_global_norm = lambda norm_type=2: self._given.norm
            wrapper.update_offload_overflow_tracker = lambda gradient: None  # it would wait for every parameter

    def squares(self) -> Tensor:
        """Of the gradients that DeepSpeed has left on this rank, or, where they are in files, of their norms."""
        counted: list[Tensor] = []
        copies: list[Tensor] = []
        for parameter, gradient in self._gradients():
            (counted if self._is_counted(parameter) else copies).append(gradient)
        if self._is_offloaded:  # single numbers
            counted, copies = ([torch.stack(norms).float()] if norms else [] for norms in (counted, copies))
        return weighed_squares(counted, copies).to(self.engine.device, non_blocking=True)

    def _gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each parameter of this rank with its gradient, or with its norm, whose square is that of the gradient."""
        wrapper = self.wrapper
        groups = wrapper.fp16_groups if self._is_stage_3 else wrapper.params_in_partition
        for number, parameters in enumerate(groups):
            if not self._is_offloaded:
                yield from zip(parameters, wrapper.averaged_gradients[number], strict=True)
                continue
            for parameter in parameters:
                norm = wrapper.norm_for_param_grads.get(wrapper.get_param_id(parameter))
                if norm is not None:
                    yield parameter, norm

    def settle(self, report: Report) -> tuple[float, bool]:
        """DeepSpeed has counted by itself."""
        is_applied = bool(self.engine.was_step_applied())
        return float(self.engine.get_global_grad_norm()), is_applied
