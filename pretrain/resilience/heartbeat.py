"""The progress of a rank: its current stage and step, and how long its own work takes.

The training thread notes in memory what it begins, in half a microsecond; the watchdog's thread reads this and writes
it every few seconds to RUN/heartbeats/rank_00003.json, where every other rank can read it.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["start", "step", "evaluation", "checkpoint", "end"]

_REMEMBERED = 100  # durations of each kind
_SIGN_BYTES = 1024  # a sign overwrites the one before in one piece, so that no reader sees half of it


class Heartbeat:
    """The position of this rank's training thread; only that thread writes it.

    Attributes:
        kind: selects the time-out.
        stage: what the rank is doing now.
        step: the optimizer step that it is working on.
        pulse: changes whenever anything begins.
        ticks: how many stages have begun that all ranks go through in the same order: a rank with fewer is behind.
        work_stages: the stages that no other rank can delay; their seconds add up.
        listener: hears of every stage that begins, and when (monotonic clock).
    """

    def __init__(self, step: int = 0) -> None:
        self.kind: Kind = "start"
        self.stage = "start"
        self.step = step
        self.pulse = 0
        self.ticks = 0
        self.work_stages: frozenset[str] = frozenset({"data", "forward"})
        self.listener: Callable[[str, float], None] | None = None
        self._durations: dict[Kind, deque[float]] = {}
        self._since = self._step_since = time.monotonic()
        self._work_seconds = self._step_seconds = 0.0
        self._num_steps = 0

    def enter(self, stage: str, *, in_lockstep: bool = True) -> None:
        """Note that `stage` begins; `in_lockstep`: every rank goes through it, and equally often."""
        now = time.monotonic()
        if self.stage in self.work_stages:
            self._work_seconds += now - self._since
        self.stage, self._since = stage, now
        self.pulse += 1
        self.ticks += in_lockstep
        if self.listener is not None:
            self.listener(stage, now)

    def begin_step(self, step: int) -> None:
        """Note that the next optimizer step begins, with its data; until the first one has ended, this is the start."""
        self.step = step
        self.kind = "step" if "step" in self._durations else "start"
        self.enter("data")
        self._step_since = self._since

    def end_step(self) -> None:
        """Note that the optimizer step is done. The first one compiles and connects, so its duration does not count."""
        self.enter("between steps")
        if self.kind == "start":
            self._durations["step"] = deque(maxlen=_REMEMBERED)
            self._work_seconds = 0.0
        else:
            self._durations["step"].append(self._since - self._step_since)
            self._step_seconds += self._since - self._step_since
            self._num_steps += 1

    @contextmanager
    def during(self, kind: Kind) -> Iterator[None]:
        """Inside this context the work is of this kind and has its time-out; its duration is remembered.

        After an error inside, the heartbeat stays where it was, because the error is about that place.
        """
        kind_before, stage_before, start = self.kind, self.stage, time.monotonic()
        self.kind = kind
        self.enter(kind)
        yield
        self._durations.setdefault(kind, deque(maxlen=_REMEMBERED)).append(time.monotonic() - start)
        self.kind = kind_before
        self.enter(stage_before)

    def slowest(self, kind: Kind) -> float:
        """Seconds that the slowest of the last hundred of this kind has taken; 0 before the first."""
        return max(self._durations.get(kind, ()), default=0.0)

    def add_work(self, seconds: float) -> None:
        """Add work that this thread's clock does not show: that of a GPU."""
        self._work_seconds += seconds

    def take_work(self) -> tuple[float, float]:
        """Seconds of this rank's own work per step, and of a whole step, averaged since the last call."""
        steps, work, whole = max(self._num_steps, 1), self._work_seconds, self._step_seconds
        self._work_seconds, self._step_seconds, self._num_steps = 0.0, 0.0, 0
        return work / steps, whole / steps


@dataclass(frozen=True)
class Sign:
    """A sign of life: what one rank shows the others.

    `count` grows with every sign; if it stops growing, the process is not running. `silent_seconds` is how long nothing
    has begun; `is_waiting` says that the rank is inside a collective, and `place` where it is in this program, both
    known only while it is silent. `start` distinguishes this start of the run from earlier ones.
    """

    start: str
    rank: int
    host: str
    process: int
    count: int
    kind: str
    stage: str
    step: int
    ticks: int
    silent_seconds: float
    is_waiting: bool = False
    place: str = ""
    has_given_up: bool = False


class SignFolder:
    """RUN/heartbeats: one small file per rank, and `hang.json` once a rank has found a hang."""

    def __init__(self, path: Path, start: str) -> None:
        self.path = path
        self.start = start
        self._verdict = path / "hang.json"

    def write(self, sign: Sign) -> None:
        """Replace the rank's last sign. Closing the file makes other nodes see it on NFS."""
        text = json.dumps(asdict(sign)).encode().ljust(_SIGN_BYTES)
        descriptor = os.open(self._file(sign.rank), os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.pwrite(descriptor, text, 0)
        finally:
            os.close(descriptor)

    def read(self, world_size: int) -> dict[int, Sign]:
        """The last sign of every rank that has given one in this start of the run."""
        signs = (self._read(rank) for rank in range(world_size))
        return {sign.rank: sign for sign in signs if sign is not None and sign.start == self.start}

    def _read(self, rank: int) -> Sign | None:
        try:
            return Sign(**json.loads(self._file(rank).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def _file(self, rank: int) -> Path:
        return self.path / f"rank_{rank:05d}.json"

    def declare(self, verdict: str) -> str:
        """Tell all ranks that the run hangs; returns the verdict that counts, that of the first rank to declare one."""
        temporary = self.path / f"hang.{os.getpid()}.tmp"
        temporary.write_text(json.dumps({"start": self.start, "verdict": verdict}), encoding="utf-8")
        try:
            os.link(temporary, self._verdict)
        except FileExistsError:
            return self.verdict() or verdict
        finally:
            temporary.unlink(missing_ok=True)
        return verdict

    def verdict(self) -> str | None:
        """The verdict that a rank has declared; None if there is none."""
        try:
            record = json.loads(self._verdict.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return str(record["verdict"]) if record.get("start") == self.start else None
