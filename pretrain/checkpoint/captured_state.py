"""One rank's share of a run's state at one moment: checked for non-finite values, copied, and written later.

The copy lies in CPU memory that training never touches, so that a thread can write it while training continues.

Shape letters: N elements of a range.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.state_files import WEIGHT, Range, write_counters, write_state
from pretrain.durable import FileRecord
from pretrain.errors import CheckpointError
from pretrain.model.parameter_shape import ParameterShape
from pretrain.runlog import get_logger

_WORDS = {WEIGHT: "weight", "exp_avg": "first moment", "exp_avg_sq": "second moment"}
_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every GPU of the process

log = get_logger(__name__)


@dataclass(frozen=True)
class CapturedState:
    """The state that one rank has to write; `problem` is one line about non-finite values, None if there are none."""

    rank: int
    ranges: Sequence[Range]
    values: Callable[[Range], Tensor]
    shapes: Mapping[str, ParameterShape]
    counters: Mapping[str, Any]
    problem: str | None

    def write(self, folder: Path) -> list[FileRecord]:
        """Write the files of this rank into `folder`; returns the records of the files, which are durable by then.

        Raises:
            OSError: the disk refuses.
        """
        records = [write_state(folder, self.rank, self.ranges, self.values, self.shapes)]
        if self.rank == 0:
            records.append(write_counters(folder, self.counters))
        return records


def find_non_finite(ranges: Sequence[Range], values: Callable[[Range], Tensor]) -> str | None:
    """One line about the non-finite values [N], on any device; None if all are finite.

    One pass over the memory finds the smallest and the largest value, without a second tensor; a NaN is both of them.
    """
    if not ranges:
        return None
    extremes = [torch.stack(values(state_range).aminmax()).float() for state_range in ranges]
    is_good = torch.stack([pair.cpu() for pair in extremes]).isfinite().all(dim=1).tolist()
    bad_ranges = [state_range for state_range, good in zip(ranges, is_good, strict=True) if not good]
    if not bad_ranges:
        return None
    first, more = bad_ranges[0], f"; and {len(bad_ranges) - 1} more" if len(bad_ranges) > 1 else ""
    count = int((~values(first).isfinite()).sum())
    return (
        f"{_WORDS[first.kind]} of {first.name}: {count:,} of the {first.length:,} values from {first.start:,} on "
        f"are NaN or infinite{more}"
    )


class HostMemory:
    """CPU memory for a copy of a rank's state, allocated once and reused by every copy.

    Args:
        is_page_locked: for state on a GPU, which then copies asynchronously and several times as fast.
    """

    def __init__(self, *, is_page_locked: bool) -> None:
        self._is_page_locked = is_page_locked
        self._flat = torch.empty(0)

    def reserve(self, ranges: Sequence[Range]) -> None:
        """Allocate the memory for these ranges, and touch it, so that the first save need not.

        Raises:
            CheckpointError: there is not enough.
        """
        total = sum(state_range.length for state_range in ranges)
        if self._flat.numel() == total:
            return
        self._flat = torch.empty(0)  # free the old memory before allocating the new
        try:
            self._flat = torch.empty(total).fill_(0.0)
        except RuntimeError:
            num_bytes = total * self._flat.element_size()
            raise CheckpointError(
                f"checkpoint.asynchronous: {num_bytes:,} bytes of CPU memory for a copy of this rank's state cannot be "
                "allocated; set checkpoint.asynchronous=false, or start more data-parallel ranks"
            ) from None
        if self._is_page_locked:
            _lock_pages(self._flat)

    def copy(self, ranges: Sequence[Range], values: Callable[[Range], Tensor]) -> Callable[[Range], Tensor]:
        """Copy the values [N] of all ranges, as fp32; returns the function that gives the copies.

        Copies from a GPU are only started: wait for the device before reading them.
        """
        self.reserve(ranges)
        parts = self._flat.split([state_range.length for state_range in ranges])
        for state_range, part_N in zip(ranges, parts, strict=True):
            part_N.copy_(values(state_range), non_blocking=self._is_page_locked)
        return dict(zip(ranges, parts, strict=True)).__getitem__


def _lock_pages(flat: Tensor) -> None:
    """Page-lock memory in place: torch's own pinned memory takes the next power of two in bytes."""
    runtime: Any = torch.cuda.cudart()
    code = int(runtime.cudaHostRegister(flat.data_ptr(), flat.nbytes, _PORTABLE))
    if code == 0:
        weakref.finalize(flat, runtime.cudaHostUnregister, flat.data_ptr())
    else:
        log.warning(
            "memory for copies of the state (%d bytes) cannot be page-locked (CUDA error %d): every save will stop "
            "training for longer; raise the limit of locked memory (ulimit -l), or set checkpoint.asynchronous=false",
            flat.nbytes,
            code,
        )
