"""What can go wrong while a run goes on: signals, and steps that are not finite.

A request to stop, by a signal or a file, becomes a flag, and the run ends at the next step boundary with everything
saved.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from pretrain.errors import TacoError
from pretrain.runlog import get_logger

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
EXIT_PREEMPTED = 75
BAD_STEPS_FILE = "bad_steps.jsonl"

log = get_logger(__name__)


class PreemptedError(TacoError):
    """The run was asked to stop, has saved, and continues when the same command is given again."""

    exit_code = EXIT_PREEMPTED


class NonFiniteLossError(TacoError):
    """Losses or gradients are NaN or infinite, again and again; what is on the disk is still good."""


@dataclass
class BadSteps:
    """Counts steps whose loss or gradient is not finite, and writes down what was in them.

    Such a step changes no weight and the run goes on with the next rows; `limit` of them in a row end it. A finite loss
    with an infinite gradient is everyday business of fp16's loss scaling, which looks for its scale: it is no bad step.

    Args:
        folder: the run's, where `bad_steps.jsonl` is.
        limit: bad steps in a row that are too many.
        is_scaled: whether losses are scaled (fp16).
    """

    folder: Path
    limit: int
    is_scaled: bool
    num_in_a_row: int = 0

    def note(self, step: int, loss: float, grad_norm: float, *, is_skipped: bool) -> bool:
        """Whether optimizer step `step` was bad.

        Raises:
            NonFiniteLossError: it was one too many, or the weights have taken it in.
        """
        if math.isfinite(loss + grad_norm) or (self.is_scaled and is_skipped and math.isfinite(loss)):
            self.num_in_a_row = 0
            return False
        self.num_in_a_row += 1
        what = f"step {step}: loss {loss}, gradient norm {grad_norm}"
        if not is_skipped:
            raise NonFiniteLossError(f"{what}; nothing of it is saved; lower optim.lr or look at the data")
        log.warning("%s: skipped, %d in a row (the run ends at %d)", what, self.num_in_a_row, self.limit)
        return True

    def check_limit(self, step: int, last_saved: int) -> None:
        """End the run where too many steps in a row were bad.

        Raises:
            NonFiniteLossError: with the last good checkpoint and what to do.
        """
        if self.num_in_a_row >= self.limit:
            raise NonFiniteLossError(
                f"step {step}: loss or gradient not finite for {self.num_in_a_row} steps in a row "
                f"(train.max_bad_steps); nothing of them is saved, the last checkpoint is of step {last_saved}. Their "
                f"rows are in {self.folder / BAD_STEPS_FILE}; lower optim.lr, look at the data, or continue with "
                "another run.seed and --allow-change run.seed"
            )

    def write_down(self, step: int, loss: float, grad_norm: float, rows: Sequence[tuple[int, int]]) -> None:
        """Append which rows of the training stream (first, one past the last) a bad step had; rank 0 calls it."""
        record = {"step": step, "loss": str(loss), "grad_norm": str(grad_norm), "rows": [list(pair) for pair in rows]}
        try:
            with (self.folder / BAD_STEPS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            log.warning("the rows of a bad step are not written down: %s", error)


# A terminal and a scheduler signal every process of a job, and a launcher forwards what it got: one wish, heard twice.
ECHO_SECONDS = 5.0
# How often a stop file is looked for: a step may take milliseconds, a shared file system does not like that.
LOOK_SECONDS = 1.0


class StopRequest:
    """Turns the first signal into `is_set`; another one, later than an echo of it, ends the process at once."""

    def __init__(self, rank: int = 0) -> None:
        self.signal_name: str | None = None
        self._who = "" if rank == 0 else f"[rank {rank}] "
        self._is_logged = False
        self._since = 0.0
        self._file: Path | None = None
        self._looked = -LOOK_SECONDS

    @property
    def is_set(self) -> bool:
        """True after a signal has arrived, or while the watched file is there."""
        if self.signal_name is None:
            return self._is_file_there()
        if not self._is_logged:
            self._is_logged = True
            log.info("stopping after %s", self.signal_name)
        return True

    def watch(self, file: Path) -> None:
        """Take this file, as soon as somebody makes it, for a request to stop; one rank is enough for all."""
        self._file = file

    def _is_file_there(self) -> bool:
        if self._file is None or time.monotonic() - self._looked < LOOK_SECONDS:
            return False
        self._looked = time.monotonic()
        if not os.path.exists(self._file):  # never raises: a file system that fails for a moment stops no run
            return False
        log.warning("%s: is there; will save at the end of this step and stop; remove it to go on later", self._file)
        return True

    def install(self) -> None:
        """Take over the stop signals of this process (main thread only)."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None:
            if time.monotonic() - self._since > ECHO_SECONDS:
                os._exit(128 + number)
            return
        self._since = time.monotonic()
        self.signal_name = signal.Signals(number).name
        # Not by the logger: the signal may have come while the same thread writes a line of its own, which Python's
        # streams answer with a RuntimeError.
        text = (
            f"{self._who}{self.signal_name}: will save at the end of this step and stop; after that, once more stops "
        )
        line_end = "\n" if os.isatty(2) else ""  # of a progress bar
        with contextlib.suppress(OSError):
            os.write(2, f"{line_end}{text}at once\n".encode())
