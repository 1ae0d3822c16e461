"""Saving while training continues: a state captured between two steps, and a thread that makes a checkpoint of it.

The thread changes nothing about a save: the same files, the same commit (`checkpoint/store.py`). Its votes go through a
separate group, in the order of the saves, and there is one save at a time; so no collective of training waits for one
of saving, or vice versa.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from pretrain import durable
from pretrain.checkpoint.captured_state import CapturedState
from pretrain.checkpoint.manifest import CheckpointManifest, step_folder
from pretrain.checkpoint.store import CheckpointStore
from pretrain.config.sections import CheckpointSection
from pretrain.durable import FileRecord
from pretrain.engine.engine import Engine
from pretrain.errors import CheckpointError
from pretrain.metrics import MetricsLog
from pretrain.parallel import collectives
from pretrain.runlog import get_logger
from pretrain.step import Action, DoneStep, StepPlan, Watcher

log = get_logger(__name__)

_GUESSED_STALL_SECONDS = 10.0  # until the first one has been measured


class NonFiniteStateError(CheckpointError):
    """Weights or moments are non-finite; nothing is saved."""


class Saver(Watcher):
    """The saves of one run; every rank makes one, and calls `save` and `wait` at the same steps.

    Args:
        extras: small files that go into every checkpoint, by their names in it. They are kept in memory, so that a
            change on the disk during the run reaches no checkpoint.

    Attributes:
        captured_step: step of the newest captured state, the same on every rank.
        committed_step: step of the newest checkpoint that this rank knows to be committed.
        stall_seconds: how long training was blocked for the newest save: capturing, and waiting for its end.
    """

    def __init__(
        self,
        engine: Engine,
        store: CheckpointStore,
        extras: Mapping[str, bytes],
        metrics: MetricsLog,
        section: CheckpointSection,
    ) -> None:
        self._engine = engine
        self._store = store
        self._extras = extras
        self._metrics = metrics
        self._section = section
        self._pending: _PendingSave | None = None
        if section.asynchronous:
            engine.reserve_copies()
        self.stall_seconds = _GUESSED_STALL_SECONDS
        self.start_from(0)

    def start_from(self, step: int) -> None:
        """Treat the state of `step` as saved: training begins there, now."""
        self.captured_step = self.committed_step = step
        self._resumed_at = self._unsaved_since = time.monotonic()

    @property
    def is_writing(self) -> bool:
        """Whether there is a pending save."""
        return self._pending is not None

    @property
    def has_failed(self) -> bool:
        """Whether the pending save has failed on this rank: a reason to call `wait` on all ranks."""
        return self._pending is not None and self._pending.error is not None

    @property
    def seconds_since_capture(self) -> float:
        """Work since the newest capture, whether its save is committed or pending."""
        return time.monotonic() - self._resumed_at

    @property
    def unsaved_seconds(self) -> float:
        """Work that a crash would lose now: a save counts from its commit on."""
        return time.monotonic() - self._unsaved_since

    def before_step(self, plan: StepPlan) -> None:
        """Tell all ranks that a save is due by time, or that one has failed on this rank."""
        plan.requests["save"] = self._is_due_by_time()
        plan.requests["failed save"] = self.has_failed

    def after_step(self, step: DoneStep) -> Action:
        """Finish a save that has ended, and say whether the next one is due.

        Raises:
            CheckpointError: a save failed on any rank.
        """
        if "failed save" in step.result.requests:
            self.wait()  # raises on every rank
        self.poll()
        every = self._section.every_steps
        is_due = "save" in step.result.requests or (every is not None and step.number % every == 0)
        return Action.SAVE if is_due else Action.CONTINUE

    def _is_due_by_time(self) -> bool:
        section = self._section
        limits = [] if section.every_minutes is None else [60 * section.every_minutes]
        if section.hours_between_failures is not None:
            limits.append(best_save_interval(self.stall_seconds, section.hours_between_failures))
        # Never while the last one is being written: a save that begins then would only block training.
        return not self.is_writing and any(self.seconds_since_capture >= limit for limit in limits)

    def save(self, manifest: CheckpointManifest) -> None:
        """Capture the state of `manifest.step` and have it written; a pending save ends first.

        Raises:
            NonFiniteStateError: it holds non-finite values, on any rank.
            CheckpointError: this save, or the pending one before it, failed on any rank.
        """
        with self._engine.heartbeat.during("checkpoint"):
            self._join()
            start = time.monotonic()
            captured = self._engine.capture_state(copies=self._section.asynchronous)
            self._refuse_non_finite(manifest.step, captured.problem)
            self.captured_step = manifest.step
            work = partial(self._store.save, manifest, partial(self._write, captured))
            self._pending = _PendingSave(manifest.step, work, has_thread=self._section.asynchronous)
            self._resumed_at = time.monotonic()
            self.stall_seconds = self._resumed_at - start
            if not self._section.asynchronous:
                self._join()

    def _write(self, captured: CapturedState, folder: Path) -> list[FileRecord]:
        """Write this rank's files into the folder of a checkpoint, on rank 0 with the extras. Raises OSError."""
        records = captured.write(folder)
        if collectives.rank() == 0:
            records += [durable.write_bytes(folder, name, content) for name, content in self._extras.items()]
        return records

    def poll(self) -> None:
        """Finish a save that has succeeded; never waits."""
        if self._pending is not None and self._pending.is_done and self._pending.error is None:
            self._finish(self._pending)

    def wait(self) -> None:
        """Wait for the pending save, if there is one, until it is committed on all ranks.

        Raises:
            CheckpointError: it failed on any rank.
        """
        with self._engine.heartbeat.during("checkpoint"):
            self._join()

    def _join(self) -> None:
        if self._pending is None:
            return
        start = time.monotonic()
        self._pending.join()
        self.stall_seconds += time.monotonic() - start
        self._finish(self._pending)

    def settle(self) -> None:
        """Wait for the pending save when the run ends for another reason, which a failed save must not hide."""
        try:
            self.wait()
        except Exception as error:  # noqa: BLE001  # logged; the other reason is about to be raised
            log.warning("%s", error)

    def _finish(self, save: _PendingSave) -> None:
        self._pending = None
        if save.error is not None:
            raise save.error
        self.committed_step, self._unsaved_since = save.step, self._resumed_at
        log.info(
            "saved %s: written in %.1f s, training blocked for %.2f s",
            save.folder,
            save.seconds,
            self.stall_seconds,
        )
        self._metrics.write(
            {"step": save.step, "save_write_seconds": save.seconds, "save_stall_seconds": self.stall_seconds}
        )

    def _refuse_non_finite(self, step: int, problem: str | None) -> None:
        failure = collectives.first_failure(problem)
        if failure is not None:
            last = f"the last one is of step {self.committed_step}" if self.committed_step else "there is none yet"
            raise NonFiniteStateError(
                f"{step_folder(self._store.root, step)}: not saved, earlier checkpoints are untouched ({last}): "
                f"{failure}; give the same command again to continue from there; if it comes back lower optim.lr, or "
                "leave that rank's GPU or node out"
            )


class _PendingSave:
    """One pending save, in a thread or not, and its outcome."""

    def __init__(self, step: int, work: Callable[[], Path], *, has_thread: bool) -> None:
        self.step = step
        self.folder: Path | None = None
        self.error: BaseException | None = None
        self.seconds = 0.0
        self._work = work
        # A daemon, so that a process that has to end can; it leaves a .tmp folder.
        self._thread = threading.Thread(target=self._run, name=f"save-{step}", daemon=True) if has_thread else None
        if self._thread is not None:
            self._thread.start()
        else:
            self._run()

    @property
    def is_done(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def join(self) -> None:
        """Wait for its end; signals are still handled meanwhile."""
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        start = time.monotonic()
        try:
            self.folder = self._work()
        except BaseException as error:  # noqa: BLE001  # the main thread raises it
            self.error = error
        self.seconds = time.monotonic() - start


def best_save_interval(save_seconds: float, hours_between_failures: float) -> float:
    """Seconds between checkpoints that lose the least time: sqrt(2 C M) - C (Young 1974; Daly 2006, equation 20).

    C is the cost of a save, M the mean time between failures. More saves cost more than they rescue, fewer lose more
    work. Never less than C, so that at most half of the time is spent saving.
    """
    mean = 3600 * hours_between_failures
    return max(math.sqrt(2 * save_seconds * mean) - save_seconds, save_seconds)
