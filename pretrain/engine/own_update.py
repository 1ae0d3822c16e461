"""The optimizer's step without ZeRO and under ZeRO-1 and 2: ours, by a verdict that stays on the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pretrain.engine.gradient_buckets import GradientBuckets, Slot
from pretrain.engine.step_report import Report
from pretrain.engine.update import Update, require, weighed_squares
from pretrain.engine.verdict import judge
from pretrain.engine.zero_state import FlatState, ZeroState
from pretrain.meters.step_clock import StepClock
from pretrain.optim import AdamW, Holdable, Lamb, squared_norm
from pretrain.parallel.mesh import Mesh


class _OwnUpdate(Update):
    """An update that runs the optimizer itself."""

    def __init__(self, engine: Any, state: ZeroState, hold: Holdable, mesh: Mesh, max_norm: float) -> None:
        super().__init__(engine, state, hold, mesh, max_norm)
        self._optimizer = state.optimizer
        self.is_queued = isinstance(self._optimizer, AdamW | Lamb)
        self._scale = 1.0

    def _loss_scale(self) -> float:
        self._scale = super()._loss_scale()  # of these gradients; `settle` may change it for the next ones
        return self._scale

    def settle(self, report: Report) -> tuple[float, bool]:
        verdict = judge(torch.tensor(report.squares, dtype=torch.float64), loss_scale=self._scale, max_norm=0.0)
        is_applied = not bool(verdict.skip)
        norm = report.squares**0.5 / self._scale if is_applied else float("inf")
        self._tell_deepspeed(norm, is_applied=is_applied)
        return norm, is_applied

    def _tell_deepspeed(self, norm: float, *, is_applied: bool) -> None:
        self.engine._global_grad_norm = norm
        self.engine._step_applied = is_applied
        self.engine.skipped_steps += not is_applied

    def _step_by_host(self, gradients: list[Tensor]) -> None:
        """The step of an optimizer that takes no verdict from the device; `gradients` are its parameters'."""
        if not bool(self._given.skip):
            torch._foreach_mul_(gradients, float(self._given.scale))
            self._run_optimizer()

    def _run_optimizer(self) -> None:
        self._optimizer.step()


class WholeUpdate(_OwnUpdate):
    """Without ZeRO: the optimizer updates the parameters of the model, and every data-parallel rank does the same."""

    def __init__(self, engine: Any, state: ZeroState, hold: Holdable, mesh: Mesh, max_norm: float) -> None:
        super().__init__(engine, state, hold, mesh, max_norm)
        require(engine, "clip_fp32_gradients", "_take_model_step")
        engine.clip_fp32_gradients = lambda: None
        # DeepSpeed calls the optimizer itself; between the two stands the verdict.
        self._run_optimizer = self._optimizer.step  # type: ignore[method-assign]
        self._optimizer.step = self._step  # type: ignore[method-assign,assignment]

    def squares(self) -> Tensor:
        """Gradients are averaged over the data-parallel ranks by now: each of them gives its part of the same sum."""
        counted: list[Tensor] = []
        copies: list[Tensor] = []
        for parameter in self.engine.module.parameters():
            if parameter.grad is not None:
                (counted if self._is_counted(parameter) else copies).append(parameter.grad.contiguous())
        return weighed_squares(counted, copies) / self.mesh.dp_size

    def _step(self, closure: Any = None) -> None:
        """In place of the method of the optimizer."""
        tensors = [tensor for group in self._optimizer.param_groups for tensor in group["params"]]
        gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
        if not self.is_queued:
            self._step_by_host(gradients)
        elif isinstance(self._optimizer, Lamb):
            if not self._keeps_weights:
                self._optimizer.update_flat(
                    [tensor.grad for tensor in tensors],
                    [None] * len(tensors),
                    gradient_scale=self._given.scale,
                    skip=self._given.skip,
                )
        else:
            torch._foreach_mul_(gradients, self._given.scale)
            self._optimizer.found_inf = self._given.skip.float()  # type: ignore[attr-defined]  # torch's kernels ask
            self._run_optimizer()


class _Place(NamedTuple):
    """Elements `offset` to `offset + length` of a partition, by its number."""

    partition: int
    offset: int
    length: int


class FlatUpdate(_OwnUpdate):
    """ZeRO-1 and 2, and DeepSpeed's bf16 optimizer: each rank updates one partition of the flat buffer of a group."""

    state: FlatState

    def __init__(
        self, engine: Any, state: ZeroState, hold: Holdable, mesh: Mesh, max_norm: float, clock: StepClock
    ) -> None:
        assert isinstance(state, FlatState)
        super().__init__(engine, state, hold, mesh, max_norm)
        self._clock = clock
        wrapper = self.wrapper
        self._is_bf16 = hasattr(wrapper, "fp32_groups_gradient_flat_partition")
        own = () if self._is_bf16 else ("averaged_gradients", "all_grad_tensors", "_update_scale", "overflow")
        require(wrapper, "step", "zero_grad", *own)
        self._partitions = state.partitions()
        self._gradients: list[Tensor] = []
        self._buckets = None if self._is_bf16 else self._take_over_reduction()
        self._counted, self._copies = self._split_places()
        wrapper.step = self._step

    def _take_over_reduction(self) -> GradientBuckets | None:
        """Let our buckets reduce the gradients, where they can: a pipeline reduces at a place of its own."""
        engine, wrapper = self.engine, self.wrapper
        require(wrapper, "dtype", "gradient_accumulation_dtype", "communication_data_type", "_grad_acc_hooks")
        require(wrapper, "reduce_bucket_size", "overlap_comm", "partition_gradients")
        require(engine, "enable_backward_allreduce")
        if self.mesh.pp_size > 1 or wrapper.dtype != wrapper.gradient_accumulation_dtype:
            return None
        for hook in wrapper._grad_acc_hooks:
            hook.remove()
        engine.enable_backward_allreduce = False
        return GradientBuckets(
            [Slot(*place) for place in self.state.places()],
            [partition.numel() for partition in self._partitions],
            rank=self.mesh.dp_rank,
            size=self.mesh.dp_size,
            group=self.mesh.data_group,
            bucket_size=wrapper.reduce_bucket_size,
            reduce_dtype=wrapper.communication_data_type,
            is_overlapped=wrapper.overlap_comm,
            is_split=wrapper.partition_gradients,
            clock=self._clock,
        )

    @contextmanager
    def collecting(self, *, is_last: bool) -> Iterator[None]:
        if self._buckets is None:
            yield
            return
        with self._buckets.collecting(is_last=is_last):
            yield

    def squares(self) -> Tensor:
        """Of this rank's partition."""
        whole = self._collect()
        if not self._copies:
            return squared_norm(whole)
        return weighed_squares(self._views(self._counted), self._views(self._copies))

    def _collect(self) -> list[Tensor]:
        """Get the gradient of each partition, in the precision in which it was summed up; returns as few tensors."""
        if self._buckets is not None:
            whole, self._gradients = self._buckets.take()
            return [whole]
        self._gradients = self._deepspeed_gradients()
        return self._gradients

    def _deepspeed_gradients(self) -> list[Tensor]:
        """Those that DeepSpeed has reduced."""
        if self._is_bf16:
            return list(self.wrapper.fp32_groups_gradient_flat_partition)
        groups = self.wrapper.averaged_gradients
        gradients = [_flatten(groups[number]) for number in range(len(self._partitions))]
        for number, (gradient, partition) in enumerate(zip(gradients, self._partitions, strict=True)):
            if gradient.numel() != partition.numel():
                raise RuntimeError(f"group {number}: {gradient.numel()} gradients for {partition.numel()} weights")
        self._release()
        return gradients

    def _release(self) -> None:
        """Drop DeepSpeed's own gradients: they are in one buffer now."""
        wrapper = self.wrapper
        for number in range(len(self._partitions)):
            wrapper.averaged_gradients[number] = wrapper.all_grad_tensors[number] = None
        wrapper.zero_grad(set_to_none=True)

    def _step(self, closure: Any = None) -> None:
        """In place of the method of DeepSpeed's optimizer."""
        gradients, self._gradients = self._gradients, []
        if not self._is_bf16:
            self.wrapper.micro_step_id = -1  # as DeepSpeed's own step leaves it
        if self._keeps_weights:
            return
        if self.is_queued:
            self._optimizer.update_flat(  # type: ignore[attr-defined]
                gradients, self.state.own_copies(), gradient_scale=self._given.scale, skip=self._given.skip
            )
            del gradients
            with self._clock.communicating():
                self.state.gather()
        else:
            for partition, gradient in zip(self._partitions, gradients, strict=True):
                partition.grad = gradient.to(partition.dtype)
            del gradients
            self._step_by_host([partition.grad for partition in self._partitions if partition.grad is not None])
            for partition in self._partitions:
                partition.grad = None
            self.state.refresh()

    def _tell_deepspeed(self, norm: float, *, is_applied: bool) -> None:
        super()._tell_deepspeed(norm, is_applied=is_applied)
        self.wrapper._global_grad_norm = norm
        self.wrapper.overflow = not is_applied
        if not self._is_bf16:
            self.wrapper._update_scale(not is_applied)

    def _split_places(self) -> tuple[list[_Place], list[_Place]]:
        """Where the partitions hold what counts for the norm, and copies of what other ranks count."""
        numbers = {id(partition): number for number, partition in enumerate(self._partitions)}
        parameters = dict(self.engine.module.named_parameters())
        counted: list[_Place] = []
        copies: list[_Place] = []
        for piece in self.state.pieces():
            place = _Place(numbers[id(piece.optimized)], piece.offset, piece.length)
            (counted if self._is_counted(parameters[piece.name]) else copies).append(place)
        return counted, copies

    def _views(self, places: list[_Place]) -> list[Tensor]:
        return [self._gradients[place.partition].narrow(0, place.offset, place.length) for place in places]


def _flatten(gradients: Any) -> Tensor:
    """The gradients of a partition [N], from the list that DeepSpeed keeps of their parts."""
    flat = getattr(gradients, "flat_partition", None)
    if flat is not None:
        return flat.view(-1)  # type: ignore[no-any-return]
    return torch.cat([gradient.reshape(-1) for gradient in gradients])
