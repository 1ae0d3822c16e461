"""Gradients from the model's parameters to this rank's partition of ZeRO-1 or 2, a bucket of many at a time.

DeepSpeed runs a tenth of a millisecond of Python, and three kernels, per parameter and step: a large model has hundreds
of small ones. Here a hook counts, and what is complete is concatenated, averaged over the data-parallel ranks beside
the backward pass, and added to the partition. One data-parallel rank concatenates once per step, without hooks.

Shape letters: N elements of all partitions of this rank, one after the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from pretrain.meters.step_clock import StepClock

# Buckets whose sums are under way at most; each has a buffer of its own.
_MAX_UNDER_WAY = 2


class Slot(NamedTuple):
    """A parameter and where it begins in the flat buffer of all ranks' partitions of its group, in elements."""

    parameter: nn.Parameter
    group: int
    offset: int


class _Run(NamedTuple):
    """Elements of a bucket, from `source` on, that belong at `target` of this rank's N elements."""

    source: int
    target: int
    length: int

    @property
    def source_end(self) -> int:
        return self.source + self.length

    @property
    def target_end(self) -> int:
        return self.target + self.length


@dataclass
class _Bucket:
    slots: list[Slot]
    runs: list[_Run]
    num_missing: int = field(init=False)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.num_missing = len(self.slots)


class GradientBuckets:
    """Collects the gradients of every optimizer step.

    Args:
        slots: of all parameters, in the model's order, which backward runs through from the end; the same on all ranks.
        partition_sizes: elements of this rank's partition of each group.
        rank: this rank's number among the `size` data-parallel ones; `group` is theirs, None for all ranks.
        bucket_size: elements after which a bucket is complete.
        reduce_dtype: in which gradients are summed over ranks.
        is_overlapped: sum them while backward runs, not after it.
        is_split: ZeRO-2: keep this rank's partition alone, so that every micro-batch is summed over the ranks.
        clock: counts the time that a CPU waits for other ranks.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        partition_sizes: Sequence[int],
        *,
        rank: int,
        size: int,
        group: distributed.ProcessGroup | None,
        bucket_size: int,
        reduce_dtype: torch.dtype,
        is_overlapped: bool,
        is_split: bool,
        clock: StepClock,
    ) -> None:
        self._slots = list(slots)
        self._sizes = list(partition_sizes)
        self._starts = [sum(self._sizes[:number]) for number in range(len(self._sizes))]
        self._rank, self._size, self._group = rank, size, group
        self._reduce_dtype = reduce_dtype
        self._clock = clock
        self._is_overlapped, self._is_split = is_overlapped, is_split
        self._gradient_N: Tensor | None = None
        self._is_reducing = False
        self._next = 0
        self._under_way: deque[tuple[_Bucket, Tensor, distributed.Work]] = deque()
        self._buckets = [] if size == 1 else [self._bucket(slots) for slots in _cut(self._slots, bucket_size)]
        if is_overlapped:
            for bucket in self._buckets:
                for slot in bucket.slots:
                    slot.parameter.register_post_accumulate_grad_hook(self._counter(bucket))

    @contextmanager
    def collecting(self, *, is_last: bool) -> Iterator[None]:
        """Around the backward pass of a micro-batch; `is_last`: the last one of the step."""
        self._is_reducing = self._size > 1 and (is_last or self._is_split)
        yield
        if self._is_reducing:
            self._finish_backward()

    def take(self) -> tuple[Tensor, list[Tensor]]:
        """The averaged gradients of the step [N], and the part of each group in them; the next step begins anew."""
        gradient_N, self._gradient_N = self._gradient_N, None
        if gradient_N is None:  # with one data-parallel rank they are still where autograd has left them
            gradient_N = self._concatenate()
        return gradient_N, list(gradient_N.split(self._sizes))

    # -- one rank ------------------------------------------------------------------------------------------------------

    def _concatenate(self) -> Tensor:
        """All gradients, each where its weights are; zeros between them."""
        parts: list[Tensor] = []
        end = 0
        for slot in sorted(self._slots, key=lambda slot: (slot.group, slot.offset)):
            start = self._starts[slot.group] + slot.offset
            if start > end:
                parts.append(slot.parameter.detach().new_zeros(start - end))
            parts.append(_take_gradient(slot.parameter))
            end = start + slot.parameter.numel()
        if sum(self._sizes) > end:
            parts.append(parts[-1].new_zeros(sum(self._sizes) - end))
        return torch.cat(parts)

    # -- several ranks -------------------------------------------------------------------------------------------------

    def _bucket(self, slots: list[Slot]) -> _Bucket:
        """A bucket of `slots`, ordered so that neighbours in a partition are neighbours in it."""
        slots = sorted(slots, key=lambda slot: (slot.group, slot.offset))
        runs: list[_Run] = []
        source = 0
        for slot in slots:
            size = self._sizes[slot.group]
            first = max(slot.offset, self._rank * size)
            last = min(slot.offset + slot.parameter.numel(), (self._rank + 1) * size)
            if first < last:
                target = self._starts[slot.group] + first - self._rank * size
                run = _Run(source + first - slot.offset, target, last - first)
                if runs and (runs[-1].source_end, runs[-1].target_end) == (run.source, run.target):
                    before = runs.pop()
                    run = _Run(before.source, before.target, before.length + run.length)
                runs.append(run)
            source += slot.parameter.numel()
        return _Bucket(slots, runs)

    def _counter(self, bucket: _Bucket) -> Callable[[Tensor], None]:
        def count(parameter: Tensor) -> None:
            if self._is_reducing:
                bucket.num_missing -= 1
                if bucket.num_missing == 0:
                    self._start_complete()

        return count

    def _start_complete(self) -> None:
        """Start what is complete; always in the same order, or ranks would sum different buckets."""
        while self._next < len(self._buckets) and self._buckets[self._next].num_missing == 0:
            self._start(self._buckets[self._next])
            self._next += 1

    def _start(self, bucket: _Bucket) -> None:
        flat = torch.cat([_take_gradient(slot.parameter) for slot in bucket.slots]).to(self._reduce_dtype)
        flat.div_(self._size)
        work = distributed.all_reduce(flat, group=self._group, async_op=True)
        assert work is not None
        self._under_way.append((bucket, flat, work))
        if len(self._under_way) > _MAX_UNDER_WAY:
            self._add_oldest()

    def _add_oldest(self) -> None:
        """Wait for a sum, on a GPU in its stream only, and add this rank's part of it."""
        bucket, flat, work = self._under_way.popleft()
        with self._clock.communicating():
            work.wait()
        if self._gradient_N is None:
            parameter = bucket.slots[0].parameter
            self._gradient_N = torch.zeros(sum(self._sizes), dtype=parameter.dtype, device=parameter.device)
        if bucket.runs:
            targets = [self._gradient_N.narrow(0, run.target, run.length) for run in bucket.runs]
            sources = [flat.narrow(0, run.source, run.length).to(targets[0].dtype) for run in bucket.runs]
            torch._foreach_add_(targets, sources)

    def _finish_backward(self) -> None:
        """Sum what is left: also the buckets of parameters that had no part in the loss."""
        for bucket in self._buckets[self._next :]:
            self._start(bucket)
        while self._under_way:
            self._add_oldest()
        for bucket in self._buckets:
            bucket.reset()
        self._next = 0
        self._is_reducing = False


def _cut(slots: Sequence[Slot], bucket_size: int) -> Iterator[list[Slot]]:
    """The slots from the last to the first, in buckets of at least `bucket_size` elements."""
    bucket: list[Slot] = []
    for slot in reversed(slots):
        bucket.append(slot)
        if sum(slot.parameter.numel() for slot in bucket) >= bucket_size:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def _take_gradient(parameter: nn.Parameter) -> Tensor:
    """The gradient of a parameter, flat, which it loses; zeros if it has none."""
    gradient, parameter.grad = parameter.grad, None
    return (parameter.detach().new_zeros(parameter.shape) if gradient is None else gradient).reshape(-1)
