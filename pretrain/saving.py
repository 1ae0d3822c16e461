"""Saving while training goes on: a state captured between two steps, and a thread that makes a checkpoint of it.

What a save is does not depend on the thread: the same files, the same commit (`checkpoint/store.py`). The thread's
votes go through a group of their own, in the order of the saves, and there is one save at a time; so no collective of
training waits for one of saving, or the other way round.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pretrain.checkpoint.manifest import CheckpointManifest, step_folder
from pretrain.checkpoint.store import CheckpointStore
from pretrain.config.sections import CheckpointSection
from pretrain.engine.engine import Engine
from pretrain.errors import CheckpointError
from pretrain.metrics import MetricsLog
from pretrain.parallel import collectives
from pretrain.runlog import get_logger
from pretrain.step import Action, DoneStep, StepPlan, Watcher

log = get_logger(__name__)

_GUESSED_STALL_SECONDS = 10.0  # until the first one has been measured


class NonFiniteStateError(CheckpointError):
    """Weights or moments are NaN or infinite; nothing of them is saved."""


class Saver(Watcher):
    """The saves of one run; every rank makes one, and calls `save` and `wait` at the same steps.

    Attributes:
        captured_step: of the newest state that was captured, on every rank the same.
        committed_step: of the newest state that is a checkpoint by what this rank knows.
        stall_seconds: that training stood still for the newest save: capturing, and waiting for its end.
    """

    def __init__(
        self,
        engine: Engine,
        store: CheckpointStore,
        extras: tuple[Path, ...],
        metrics: MetricsLog,
        section: CheckpointSection,
    ) -> None:
        self._engine = engine
        self._store = store
        self._extras = extras
        self._metrics = metrics
        self._section = section
        self._write: _Write | None = None
        if section.asynchronous:
            engine.reserve_copies()
        self.stall_seconds = _GUESSED_STALL_SECONDS
        self.start_from(0)

    def start_from(self, step: int) -> None:
        """Take the state of `step` for saved: training begins there, now."""
        self.captured_step = self.committed_step = step
        self._went_on_at = self._unsaved_since = time.monotonic()

    @property
    def is_writing(self) -> bool:
        """Whether a save has begun of which nobody has heard the end."""
        return self._write is not None

    @property
    def has_failed(self) -> bool:
        """Whether the save on its way has come to grief on this rank: a reason to call `wait` on all of them."""
        return self._write is not None and self._write.error is not None

    @property
    def seconds_since_capture(self) -> float:
        """Work since the newest capture, saved or on its way."""
        return time.monotonic() - self._went_on_at

    @property
    def unsaved_seconds(self) -> float:
        """Work that would be lost by a crash now: a save counts from its commit on."""
        return time.monotonic() - self._unsaved_since

    def before_step(self, plan: StepPlan) -> None:
        """Let all ranks hear that a save is due by time, or that one has failed on this rank."""
        plan.requests["save"] = self._is_due_by_time()
        plan.requests["failed save"] = self.has_failed

    def after_step(self, step: DoneStep) -> Action:
        """Take notice of a save that has ended, and say whether the next one is due.

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
        # Never before the last one is written: a save that begins then would only stop training.
        return not self.is_writing and any(self.seconds_since_capture >= limit for limit in limits)

    def save(self, manifest: CheckpointManifest) -> None:
        """Capture the state of `manifest.step` and have it written; an earlier save ends first.

        Raises:
            NonFiniteStateError: it holds values that are no numbers, on any rank.
            CheckpointError: this save, or the one before that was still on its way, failed on any rank.
        """
        with self._engine.heartbeat.during("checkpoint"):
            self._join()
            start = time.monotonic()
            captured = self._engine.capture_state(copies=self._section.asynchronous)
            self._refuse_non_finite(manifest.step, captured.problem)
            self.captured_step = manifest.step
            work = partial(self._store.save, manifest, captured.write, self._extras)
            self._write = _Write(manifest.step, work, has_thread=self._section.asynchronous)
            self._went_on_at = time.monotonic()
            self.stall_seconds = self._went_on_at - start
            if not self._section.asynchronous:
                self._join()

    def poll(self) -> None:
        """Take notice of a save that has ended well; never waits."""
        if self._write is not None and self._write.is_done and self._write.error is None:
            self._finish(self._write)

    def wait(self) -> None:
        """Wait for the save on its way, if there is one, until it is committed on all ranks.

        Raises:
            CheckpointError: it failed on any rank.
        """
        with self._engine.heartbeat.during("checkpoint"):
            self._join()

    def _join(self) -> None:
        if self._write is None:
            return
        start = time.monotonic()
        self._write.join()
        self.stall_seconds += time.monotonic() - start
        self._finish(self._write)

    def settle(self) -> None:
        """Wait for the save on its way when the run ends for another reason, which its failure must not hide."""
        try:
            self.wait()
        except Exception as error:  # noqa: BLE001  # told, and the other reason is about to be raised
            log.warning("%s", error)

    def _finish(self, write: _Write) -> None:
        self._write = None
        if write.error is not None:
            raise write.error
        self.committed_step, self._unsaved_since = write.step, self._went_on_at
        log.info(
            "saved %s: written in %.1f s, training stood still for %.2f s",
            write.folder,
            write.seconds,
            self.stall_seconds,
        )
        self._metrics.write(
            {"step": write.step, "save_write_seconds": write.seconds, "save_stall_seconds": self.stall_seconds}
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


class _Write:
    """One save on its way to the disk, in a thread or not, and what has become of it."""

    def __init__(self, step: int, work: Callable[[], Path], *, has_thread: bool) -> None:
        self.step = step
        self.folder: Path | None = None
        self.error: BaseException | None = None
        self.seconds = 0.0
        self._work = work
        # A daemon, so that a process that has to end can: what it leaves is a .tmp folder.
        self._thread = threading.Thread(target=self._run, name=f"save-{step}", daemon=True) if has_thread else None
        if self._thread is not None:
            self._thread.start()
        else:
            self._run()

    @property
    def is_done(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def join(self) -> None:
        """Wait for the end; signals are still heard meanwhile."""
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

    C is what a save costs, M the mean time between failures. Saves more often cost more than they rescue, fewer lose
    more work. Never less than C, so that half of the time at most is spent saving.
    """
    mean = 3600 * hours_between_failures
    return max(math.sqrt(2 * save_seconds * mean) - save_seconds, save_seconds)
