"""Where the time of a step goes: data, forward, backward, optimizer, communication, host.

On a CPU the host's clock tells, stage by stage. On a GPU the host only queues work, so events on the stream tell when
the GPU has come to the beginning of each stage; they are read once they have completed, a step later, and nothing ever
waits for them. The parts always add up to the wall-clock time of a step:

    forward, backward, optimizer   GPU: from event to event, including moments in which the GPU waits for the host
    communication                  collectives between stages (losses, counts, pipeline); on a CPU also those that
                                   DeepSpeed carries out inside other stages. On a GPU DeepSpeed's run beside
                                   backward, on a stream of their own, and are part of it
    data                           the host waited for rows
    host                           the rest: the loop, reports, watchers; on a GPU also reading back the results
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

import torch

Part = Literal["data", "forward", "backward", "optimizer", "communication", "host"]
PARTS: Final = get_args(Part)

# Stages of the heartbeat by part. Those of a pipeline carry the names of DeepSpeed's instructions.
_PARTS: Mapping[str, Part] = {
    "data": "data",
    "load micro batch": "data",
    "forward": "forward",
    "forward pass": "forward",
    "backward": "backward",
    "backward pass": "backward",
    "optimizer": "optimizer",
    "optimizer step": "optimizer",
    "losses": "communication",
    "count of masked tokens": "communication",
    "send activation": "communication",
    "recv activation": "communication",
    "send grad": "communication",
    "recv grad": "communication",
    "reduce grads": "communication",
    "reduce tied grads": "communication",
}
_END = "between steps"
_NOT_OF_A_STEP = frozenset({"start", "evaluation", "checkpoint", "end"})
_ON_THE_GPU: Final[tuple[Part, ...]] = ("forward", "backward", "optimizer", "communication")
# Those of DeepSpeed's functions that wait, on a CPU, for other ranks.
_COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_gather_coalesced", "all_reduce", "all_reduce_coalesced",
    "all_to_all_single", "barrier", "broadcast", "reduce", "reduce_scatter", "reduce_scatter_tensor",
)  # fmt: skip
_MOST_PENDING = 8  # steps whose events are still to be read


@dataclass(frozen=True)
class StepTimes:
    """Seconds per step, a mean over `steps` steps. `parts` adds up to `wall`."""

    steps: int
    wall: float
    parts: dict[Part, float]


@dataclass
class _Step:
    """What was noted of one step; `events` are those of a GPU, with the part that begins at each."""

    wall: float = 0.0
    parts: dict[Part, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    events: list[tuple[Part, Any]] = field(default_factory=list)


class StepClock:
    """Listens to the stages of a heartbeat (`Heartbeat.listener`), in the training thread only.

    A step is counted from its end to the end of the one after, without evaluations and saves.
    """

    def __init__(self, device: torch.device, new_event: Callable[[], Any] | None = None) -> None:
        """`new_event` makes something like a `torch.cuda.Event`; by default a CPU uses none."""
        if new_event is None and device.type == "cuda":
            new_event = _cuda_event
        self._new_event = new_event
        self._step = _Step()
        self._part: Part | None = None
        self._since = time.monotonic()
        self._aside = 0.0  # seconds of the current stage that another part has been given
        self._pending: deque[_Step] = deque()
        self._done: list[_Step] = []
        self._spare: list[Any] = []

    def enter(self, stage: str, now: float) -> None:
        """A stage begins, at `now` of the monotonic clock."""
        if self._part is not None:
            elapsed = now - self._since
            self._step.wall += elapsed
            self._step.parts[self._part] += elapsed - self._aside
        self._since, self._aside = now, 0.0
        if stage in _NOT_OF_A_STEP:
            self._part = None
            return
        if stage == _END and self._part is not None:
            self._mark("host")
            self._finish()
        self._part = _PARTS.get(stage, "host")
        if self._part in _ON_THE_GPU:
            self._mark(self._part)

    @contextmanager
    def communicating(self) -> Iterator[None]:
        """What happens inside, in the middle of a stage, is communication; for a CPU, where it blocks."""
        if self._new_event is not None or self._part in (None, "communication"):
            yield
            return
        start = time.monotonic()
        part, self._part = self._part, "communication"  # one collective may call another
        try:
            yield
        finally:
            elapsed = time.monotonic() - start
            self._part = part
            self._aside += elapsed
            self._step.parts["communication"] += elapsed

    def reading_back(self) -> None:
        """The host begins to wait for results of the GPU; what it waits for has been queued."""
        self._mark("host")

    def watch(self, backend: object) -> None:
        """On a CPU, count the collectives of DeepSpeed's communication backend as communication."""
        if self._new_event is None:
            for name in _COLLECTIVES:
                if hasattr(backend, name):
                    setattr(backend, name, self._timed(getattr(backend, name)))

    def take(self) -> StepTimes | None:
        """Means over the steps since the last call; None if there is none, or a GPU has not finished any."""
        self._read_events()
        done, self._done = self._done, []
        if not done:
            return None
        parts: dict[Part, float] = {part: sum(step.parts[part] for step in done) / len(done) for part in PARTS}
        return StepTimes(len(done), sum(step.wall for step in done) / len(done), parts)

    def _timed(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        collective = getattr(collective, "untimed", collective)  # if an earlier engine of this process timed it

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.communicating():
                return collective(*args, **kwargs)

        timed.untimed = collective  # type: ignore[attr-defined]
        return timed

    def _mark(self, part: Part) -> None:
        if self._new_event is None:
            return
        event = self._spare.pop() if self._spare else self._new_event()
        event.record()
        self._step.events.append((part, event))

    def _finish(self) -> None:
        """The step is over on the host."""
        step, self._step = self._step, _Step()
        if self._new_event is None:
            self._done.append(step)
            return
        self._pending.append(step)
        self._read_events()
        if len(self._pending) > _MOST_PENDING:  # never seen: a host eight steps ahead
            self._pending.popleft()

    def _read_events(self) -> None:
        """Take over the steps that a GPU has finished, in order."""
        while self._pending and self._pending[0].events[-1][1].query():
            step = self._pending.popleft()
            data, spans = step.parts["data"], dict.fromkeys(_ON_THE_GPU, 0.0)
            for (part, first), (_, last) in zip(step.events, step.events[1:], strict=False):
                if part in spans:
                    spans[part] += first.elapsed_time(last) / 1000
            busy = sum(spans.values())
            step.wall = max(step.wall, busy)
            step.parts.update(spans)
            step.parts["data"] = min(data, step.wall - busy)  # the rest passed beside the GPU's work
            step.parts["host"] = step.wall - busy - step.parts["data"]
            self._spare += [event for _, event in step.events]
            self._done.append(step)


def _cuda_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
