"""One rank's share of a run's state at one moment: checked for numbers that are none, copied, and written later.

A copy lies in memory of the CPU that training never touches, so that a thread can write it while steps go on.

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
    """What one rank has to write; `problem` says in one line which values are not finite, and is None where all are."""

    rank: int
    ranges: Sequence[Range]
    values: Callable[[Range], Tensor]
    shapes: Mapping[str, ParameterShape]
    counters: Mapping[str, Any]
    problem: str | None

    def write(self, folder: Path) -> list[FileRecord]:
        """Write the files of this rank into `folder`; what it wrote, already durable.

        Raises:
            OSError: the disk refuses.
        """
        records = [write_state(folder, self.rank, self.ranges, self.values, self.shapes)]
        if self.rank == 0:
            records.append(write_counters(folder, self.counters))
        return records


def find_non_finite(ranges: Sequence[Range], values: Callable[[Range], Tensor]) -> str | None:
    """One line about the values [N] of any device that are NaN or infinite; None where all are finite.

    The smallest and the largest value tell, in one pass over the memory and without a second tensor: NaN is both.
    """
    if not ranges:
        return None
    extremes = [torch.stack(values(found).aminmax()).float() for found in ranges]
    is_good = torch.stack([pair.cpu() for pair in extremes]).isfinite().all(dim=1).tolist()
    bad = [found for found, good in zip(ranges, is_good, strict=True) if not good]
    if not bad:
        return None
    first, more = bad[0], f"; and {len(bad) - 1} more" if len(bad) > 1 else ""
    count = int((~values(first).isfinite()).sum())
    return (
        f"{_WORDS[first.kind]} of {first.name}: {count:,} of the {first.length:,} values from {first.start:,} on "
        f"are NaN or infinite{more}"
    )


class HostMemory:
    """Memory of the CPU for a copy of a rank's state, taken once and used again by every copy.

    Args:
        is_page_locked: for state on a GPU, which then copies by itself and several times as fast.
    """

    def __init__(self, *, is_page_locked: bool) -> None:
        self._is_page_locked = is_page_locked
        self._flat = torch.empty(0)

    def reserve(self, ranges: Sequence[Range]) -> None:
        """Take the memory for these ranges, and touch it, so that the first save need not.

        Raises:
            CheckpointError: it is not there.
        """
        total = sum(found.length for found in ranges)
        if self._flat.numel() == total:
            return
        self._flat = torch.empty(0)  # the old memory goes before the new one comes
        try:
            self._flat = torch.empty(total).fill_(0.0)
        except RuntimeError:
            num_bytes = total * self._flat.element_size()
            raise CheckpointError(
                f"checkpoint.asynchronous: {num_bytes:,} bytes of CPU memory for a copy of this rank's state cannot be "
                "had; set checkpoint.asynchronous=false, or start more data-parallel ranks"
            ) from None
        if self._is_page_locked:
            _lock_pages(self._flat)

    def copy(self, ranges: Sequence[Range], values: Callable[[Range], Tensor]) -> Callable[[Range], Tensor]:
        """Copy the values [N] of all ranges, as fp32; the function that gives the copies.

        Copies from a GPU are only started: wait for the device before they are read.
        """
        self.reserve(ranges)
        parts = self._flat.split([found.length for found in ranges])
        for found, part_N in zip(ranges, parts, strict=True):
            part_N.copy_(values(found), non_blocking=self._is_page_locked)
        return dict(zip(ranges, parts, strict=True)).__getitem__


def _lock_pages(flat: Tensor) -> None:
    """Page-lock memory as it lies: what torch pins by itself takes the next power of two in bytes."""
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
