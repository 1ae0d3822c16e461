"""What ranks tell each other at the end of a step, in one small collective, which the host reads back once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.model.pretraining import PretrainingLosses
from pretrain.parallel import collectives

_NUM_LOSSES = 3


@dataclass(frozen=True)
class Report:
    """The figures and messages of a step; the same on all ranks. `squares` is the sum of squares of all gradients."""

    loss: float
    mlm_loss: float
    contrastive_loss: float
    squares: float
    requests: frozenset[str]
    work_seconds: tuple[float, ...]


class PendingReport:
    """A report whose sum over the ranks is queued on the device; every rank of the run makes one at the same place.

    Args:
        own_losses: of the micro-batches whose losses this rank computed.
        num_losses: losses of the whole step, over all ranks that compute them.
        squares: this rank's share of the sum of squares of all gradients; 0 dimensions, fp64, on `device`.
        requests: by name, whether this rank makes the request; all ranks pass the same names.
        work_seconds: this rank's own work per step; all ranks pass it, or none.
    """

    def __init__(
        self,
        own_losses: Sequence[PretrainingLosses],
        num_losses: int,
        squares: Tensor,
        requests: Mapping[str, bool],
        work_seconds: float | None,
        device: torch.device,
    ) -> None:
        self._requests = tuple(requests)
        self._report: Report | None = None
        losses = torch.zeros(_NUM_LOSSES, dtype=torch.float64, device=device)
        for micro_batch in own_losses:
            losses += torch.stack([micro_batch.total, micro_batch.mlm, micro_batch.contrastive])
        losses /= num_losses
        messages = [*map(float, requests.values()), *_rank_slots(work_seconds)]
        self._sums = collectives.sum_over_ranks(
            torch.cat([losses, squares.reshape(1), *([_on_device(messages, device)] if messages else [])])
        )
        self._copy: Tensor | None = None
        self._is_copied: torch.cuda.Event | None = None

    @property
    def squares(self) -> Tensor:
        """The sum of squares of all gradients of all ranks; 0 dimensions, fp64, on the device."""
        return self._sums[_NUM_LOSSES]

    @property
    def is_read(self) -> bool:
        """Whether the host has the report."""
        return self._report is not None

    def start_reading(self) -> None:
        """Queue the copy to the host behind what is queued already; `read` waits for this copy and nothing else."""
        if self._sums.device.type == "cuda" and self._copy is None:
            self._copy = torch.empty(self._sums.shape, dtype=self._sums.dtype, pin_memory=True)
            self._copy.copy_(self._sums, non_blocking=True)
            self._is_copied = torch.cuda.Event()
            self._is_copied.record()

    def read(self) -> Report:
        """Wait for the report; the one place of a step where the host waits for the device."""
        if self._report is None:
            self.start_reading()
            if self._is_copied is not None:
                self._is_copied.synchronize()
            self._report = self._unpack((self._sums if self._copy is None else self._copy).tolist())
        return self._report

    def _unpack(self, sums: list[float]) -> Report:
        (loss, mlm, contrastive, squares), rest = sums[: _NUM_LOSSES + 1], sums[_NUM_LOSSES + 1 :]
        votes, work = rest[: len(self._requests)], rest[len(self._requests) :]
        granted = frozenset(name for name, count in zip(self._requests, votes, strict=True) if count > 0)
        return Report(loss, mlm, contrastive, squares, granted, tuple(work))


def _on_device(values: Sequence[float], device: torch.device) -> Tensor:
    """Numbers of the host, fp64, on `device`; the host does not wait for a GPU."""
    on_host = torch.tensor(values, dtype=torch.float64, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)


def _rank_slots(value: float | None) -> list[float]:
    """One number per rank, zero except for this rank's own: the sum over ranks holds the number of each."""
    if value is None:
        return []
    slots = [0.0] * collectives.world_size()
    slots[collectives.rank()] = value
    return slots
