"""How long a GPU is busy with parts of a step, measured by its own events, without ever waiting for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class DeviceClock:
    """Adds up the time that a GPU spends between events; does nothing for a CPU, whose work the host's clock shows."""

    def __init__(self, device: torch.device) -> None:
        self.is_used = device.type == "cuda"
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure what is queued on the current stream inside this context."""
        if not self.is_used:
            yield
            return
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        yield
        last.record()
        self._spans.append((first, last))

    def take(self) -> float:
        """Seconds since the last call; call it after the host has waited for a result of the same stream."""
        spans, self._spans = self._spans, []
        return sum(first.elapsed_time(last) for first, last in spans) / 1000
