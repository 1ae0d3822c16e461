"""Ends a run that hangs: every rank writes its stacks, one line names the rank that holds up the others, exit code 124.

A thread beside the training thread: it runs while the latter waits in a collective, in a read or for a GPU. It cannot
run itself if its process is stopped or C code keeps the interpreter; the other ranks notice this from outside, because
the signs of life stop. A guard process (`watchdog_guard.py`) is the second line of defence for C code.

The time-out is learnt from the run: `watchdog.factor` times the slowest of the last hundred steps (or evaluations, or
saves), and never less than the configured floor. Time in which this process itself was stopped, as in a suspended job,
does not count.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import TextIO

from pretrain import durable
from pretrain.checkpoint.manifest import CheckpointUnreadableError, list_checkpoints
from pretrain.config.sections import WatchdogSection
from pretrain.errors import TacoError, leave_reason
from pretrain.parallel.launch import Launch
from pretrain.resilience import watchdog_guard
from pretrain.resilience.hang_verdict import describe_hang
from pretrain.resilience.heartbeat import Heartbeat, Kind, Sign, SignFolder
from pretrain.run_folder import RunFolder
from pretrain.runlog import get_logger

EXIT_HANG = 124
# In units of watchdog.heartbeat_seconds: far enough apart that every running process has given a sign in between.
_BETWEEN_LOOKS = 2.5
# The other ranks wait longer, so that rank 0 reads all signs first, then the first rank of each node.
_STAGGER = 4.0
_LAST_WORDS = 8.0
# The other ranks need time to name this one before its guard kills it: the end of one rank is the end of all.
_GUARD_PATIENCE = 12.0
# A learnt time-out stays below that of the process group, whose message says less.
_SHARE_OF_LAST_LINE = 0.8
_PACKAGE = os.sep + "pretrain" + os.sep
_COLLECTIVES = (
    os.sep + os.path.join("torch", "distributed", ""),
    os.sep + os.path.join("pretrain", "parallel", "collectives.py"),
)

log = get_logger(__name__)


class LostContactError(TacoError):
    """Another rank, or the network to it, disappeared in the middle of a collective."""

    is_consequence = True


def lost_contact(error: RuntimeError, heartbeat: Heartbeat, checkpoints: Path) -> LostContactError:
    """One line for what a collective raises when another rank is gone."""
    text = " ".join(str(error).split()).partition(". ")[0]  # the rest is advice that does not apply here
    return LostContactError(
        f"lost contact with another rank in step {heartbeat.step} ({heartbeat.stage}): {text}; look for the first rank "
        f"that ended, {_where_to_continue(checkpoints)}"
    )


def _where_to_continue(checkpoints: Path) -> str:
    try:
        saved = list_checkpoints(checkpoints)
    except CheckpointUnreadableError as error:
        return f"the same command continues once that is mended: {error}"
    return f"the same command continues from {saved[0].name}" if saved else "the same command starts over"


def start_watchdog(
    section: WatchdogSection, folder: RunFolder, heartbeat: Heartbeat, launch: Launch, start: str
) -> Watchdog | None:
    """Watch this thread, if enabled; `start` is the name of this start of the run, the same on all ranks."""
    if not section.enabled:
        return None
    watchdog = Watchdog(section, heartbeat, SignFolder(folder.heartbeats, start), folder, launch)
    watchdog.start()
    return watchdog


def silence_limit(section: WatchdogSection, kind: Kind, slowest: float) -> float:
    """Seconds without progress after which a rank counts as hanging; infinity if that is turned off.

    Args:
        slowest: duration of the slowest recent one of this kind.
    """
    floors: dict[Kind, float | None] = {
        "start": section.start_seconds,
        "step": section.step_seconds,
        "evaluation": section.evaluation_seconds,
        "checkpoint": section.checkpoint_seconds,
        "end": section.step_seconds,
    }
    floor = floors[kind]
    if floor is None:
        return math.inf
    return max(floor, min(section.factor * slowest, _SHARE_OF_LAST_LINE * section.collective_seconds))


class Watchdog:
    """Watches the training thread of this rank, which creates it, and the signs of the other ranks.

    Args:
        folder: the run folder; stacks go to its logs.
    """

    def __init__(
        self,
        section: WatchdogSection,
        heartbeat: Heartbeat,
        signs: SignFolder,
        folder: RunFolder,
        launch: Launch,
    ) -> None:
        self.section = section
        self.heartbeat = heartbeat
        self.signs = signs
        self.stacks = folder.logs / f"rank_{launch.rank:05d}.stacks"
        self._log_file = folder.logs / f"rank_{launch.rank:05d}.log"
        self._checkpoints = folder.checkpoints
        self._launch = launch
        self._watched = threading.get_ident()
        self._host = socket.gethostname()
        self._period = section.heartbeat_seconds
        order = 0 if launch.rank == 0 else 1 if launch.local_rank == 0 else 2
        self._extra_patience = order * _STAGGER * self._period
        self._count = 0
        self._pulse = -1
        self._silent = 0.0
        self._sign: Sign | None = None
        self._before: dict[int, Sign] | None = None
        self._suspicious = 0.0
        self._can_write = True
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="taco-watchdog", daemon=True)
        self._stack_file: TextIO | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin to watch. From now on SIGQUIT writes the stacks of all threads, and changes nothing else."""
        try:
            self.stacks.parent.mkdir(parents=True, exist_ok=True)
            self._stack_file = self.stacks.open("a", encoding="utf-8")
        except OSError as error:
            log.warning("no stacks will be written: %s", error)
        faulthandler.register(signal.SIGQUIT, file=self._stack_file or sys.stderr, all_threads=True)
        self._guard = watchdog_guard.start(self._launch.rank, self.stacks)
        self._give_sign()
        self._thread.start()

    def stop(self) -> None:
        """Stop watching; a hang that has been found already still ends the process."""
        self._is_over.set()
        if self._thread.is_alive():
            self._thread.join(timeout=self._period)
        if self._guard is not None:
            watchdog_guard.stop(self._guard)
        faulthandler.unregister(signal.SIGQUIT)
        if self._stack_file is not None:
            self._stack_file.close()
            with contextlib.suppress(OSError):
                if self.stacks.stat().st_size == 0:
                    self.stacks.unlink()

    def wait_for_verdict(self) -> None:
        """Give the watchdog time to end this process if another rank has found a hang and left."""
        time.sleep(self._period)
        if self.signs.verdict() is not None:
            time.sleep((_LAST_WORDS + 2) * self._period)

    # -- in the thread ----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._is_over.wait(self._period):
            now = time.monotonic()
            # A longer wait means that this process was stopped, and with it the thread that it watches.
            self._look(min(now - last, 2 * self._period))
            last = now

    def _look(self, seconds: float) -> None:
        pulse = self.heartbeat.pulse
        self._silent = 0.0 if pulse != self._pulse else self._silent + seconds
        self._pulse = pulse
        kind = self.heartbeat.kind
        limit = silence_limit(self.section, kind, self.heartbeat.slowest(kind))
        if self._guard is not None:
            watchdog_guard.tell(self._guard, limit + _GUARD_PATIENCE * self._period)
        self._give_sign()
        verdict = self.signs.verdict()
        if verdict is not None:
            self._give_up(verdict)
        if self._silent < limit + self._extra_patience:
            self._before = None
            return
        self._suspect(seconds)

    def _suspect(self, seconds: float) -> None:
        """Look at all ranks twice, far enough apart that those that run have changed."""
        if self._before is None:
            self._before, self._suspicious = self._read_signs(), 0.0
            return
        self._suspicious += seconds
        if self._suspicious < _BETWEEN_LOOKS * self._period:
            return
        description = describe_hang(self._before, self._read_signs(), self._launch.world_size)
        verdict = (
            f"{description}; stacks are in {self.stacks.parent}/rank_*.stacks; exit code {EXIT_HANG}, "
            f"{_where_to_continue(self._checkpoints)}"
        )
        with contextlib.suppress(OSError):
            verdict = self.signs.declare(verdict)
        self._give_up(verdict)

    def _read_signs(self) -> dict[int, Sign]:
        """The signs of all ranks; this rank's own even if the folder cannot be read."""
        signs = self.signs.read(self._launch.world_size)
        return signs if self._sign is None else signs | {self._launch.rank: self._sign}

    def _give_up(self, verdict: str) -> None:
        """Report the verdict and end the process; a disk that does not answer cannot prevent it."""
        patience = _LAST_WORDS * self._period
        threading.Thread(target=_exit_after, args=(patience + 1,), daemon=True).start()
        who = "" if self._launch.rank == 0 else f"[rank {self._launch.rank}] "
        # Not through the logger: the thread that hangs may hold its lock.
        if not leave_reason(f"error: {verdict}"):
            with contextlib.suppress(OSError):  # the terminal was closed
                os.write(2, f"{who}error: {verdict}\n".encode())
        with contextlib.suppress(OSError):
            durable.append_line(self._log_file, f"CRITICAL {verdict}".encode())
        with contextlib.suppress(OSError, ValueError):
            self._dump_stacks(verdict)
        self._give_sign(has_given_up=True)
        self._wait_for_others(patience)
        os._exit(EXIT_HANG)

    def _dump_stacks(self, verdict: str) -> None:
        if self._stack_file is None:
            return
        now = self.heartbeat
        self._stack_file.write(f"{verdict}\nrank {self._launch.rank} is in {now.stage} of step {now.step}:\n")
        self._stack_file.flush()
        faulthandler.dump_traceback(file=self._stack_file, all_threads=True)
        self._stack_file.write("\n")
        self._stack_file.flush()

    def _wait_for_others(self, patience: float) -> None:
        """Launchers end all ranks as soon as one has ended: let running ranks write their stacks first."""
        start, first = time.monotonic(), self.signs.read(self._launch.world_size)
        while (waited := time.monotonic() - start) < patience:
            signs = self.signs.read(self._launch.world_size)
            pending = [rank for rank, sign in signs.items() if not sign.has_given_up]
            if waited > _BETWEEN_LOOKS * self._period:
                pending = [rank for rank in pending if rank in first and signs[rank].count > first[rank].count]
            if not pending:
                return
            time.sleep(min(0.2, self._period))

    def _give_sign(self, *, has_given_up: bool = False) -> None:
        """Show the others where this rank is. A failure to write is reported once, and ends nothing."""
        self._count += 1
        is_waiting, place = _where(self._watched) if self._silent else (False, "")
        self._sign = Sign(
            start=self.signs.start,
            rank=self._launch.rank,
            host=self._host,
            process=os.getpid(),
            count=self._count,
            kind=self.heartbeat.kind,
            stage=self.heartbeat.stage,
            step=self.heartbeat.step,
            ticks=self.heartbeat.ticks,
            silent_seconds=round(self._silent, 1),
            is_waiting=is_waiting,
            place=place,
            has_given_up=has_given_up,
        )
        try:
            self.signs.write(self._sign)
            self._can_write = True
        except OSError as error:
            if self._can_write:
                log.warning("no signs of life are written: %s", error)
            self._can_write = False


def _exit_after(seconds: float) -> None:
    time.sleep(seconds)
    os._exit(EXIT_HANG)


def _where(thread: int) -> tuple[bool, str]:
    """Whether a thread is inside a collective, and its innermost line in this package."""
    frame: FrameType | None = sys._current_frames().get(thread)
    is_waiting, place = False, ""
    while frame is not None:
        name = frame.f_code.co_filename
        is_waiting |= any(part in name for part in _COLLECTIVES)
        if not place and _PACKAGE in name:
            place = f"pretrain/{name.rpartition(_PACKAGE)[2]}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return is_waiting, place
