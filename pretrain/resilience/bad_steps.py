"""Steps whose loss or gradient is non-finite: they are counted and recorded, and too many in a row end the run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pretrain import durable
from pretrain.errors import TacoError
from pretrain.parallel import collectives
from pretrain.runlog import get_logger
from pretrain.step import Action, DoneStep, Watcher

BAD_STEPS_FILE = "bad_steps.jsonl"
_COUNT = "bad_steps_in_a_row"

log = get_logger(__name__)


class NonFiniteLossError(TacoError):
    """Losses or gradients are non-finite again and again; the checkpoints on the disk are still good."""


@dataclass
class BadSteps:
    """Counts steps whose loss or gradient is non-finite, and records their rows.

    Such a step changes no weight and the run continues with the next rows; `limit` of them in a row end it. A finite
    loss with a non-finite gradient is normal while fp16's loss scaling searches for its scale: it is not a bad step.

    Args:
        folder: the run folder, where `bad_steps.jsonl` is.
        limit: bad steps in a row that are too many.
        is_scaled: whether losses are scaled (fp16).
        memory: where the number of bad steps in a row is kept, so that a restart goes on counting.
    """

    folder: Path
    limit: int
    is_scaled: bool
    memory: MutableMapping[str, int] = field(default_factory=dict)

    @property
    def num_in_a_row(self) -> int:
        """Bad steps since the last good one."""
        return self.memory.get(_COUNT, 0)

    def note(self, step: int, loss: float, grad_norm: float, *, is_skipped: bool) -> bool:
        """Whether optimizer step `step` was bad.

        Raises:
            NonFiniteLossError: it was bad and has changed the weights.
        """
        if math.isfinite(loss + grad_norm) or (self.is_scaled and is_skipped and math.isfinite(loss)):
            self.memory[_COUNT] = 0
            return False
        self.memory[_COUNT] = self.num_in_a_row + 1
        description = f"step {step}: loss {loss}, gradient norm {grad_norm}"
        if not is_skipped:
            raise NonFiniteLossError(f"{description}; nothing of it is saved; lower optim.lr or look at the data")
        log.warning("%s: skipped, %d in a row (the run ends at %d)", description, self.num_in_a_row, self.limit)
        return True

    def check_limit(self, step: int, last_saved: int) -> None:
        """End the run if too many steps in a row were bad.

        Raises:
            NonFiniteLossError: with the last good checkpoint and what to do.
        """
        if self.num_in_a_row >= self.limit:
            raise NonFiniteLossError(
                f"step {step}: loss or gradient not finite for {self.num_in_a_row} steps in a row "
                f"(train.max_bad_steps); none of them is saved, the last checkpoint is of step {last_saved}. Their "
                f"rows are in {self.folder / BAD_STEPS_FILE}; lower optim.lr, look at the data, or continue with "
                "another run.seed and --allow-change run.seed"
            )

    def write_down(self, step: int, loss: float, grad_norm: float, rows: Sequence[tuple[int, int]]) -> None:
        """Append the rows of the training stream (first, one past the last) of a bad step; rank 0 calls it."""
        record = {"step": step, "loss": str(loss), "grad_norm": str(grad_norm), "rows": [list(pair) for pair in rows]}
        try:
            durable.append_line(self.folder / BAD_STEPS_FILE, json.dumps(record).encode())
        except OSError as error:
            log.warning("the rows of a bad step could not be recorded: %s", error)


class BadStepWatcher(Watcher):
    """Ends a run after too many bad steps; every rank names the rows that it knows to be bad.

    Args:
        settle_saves: waits for the pending save; returns the step of the newest checkpoint, the same on all ranks.
    """

    def __init__(self, counter: BadSteps, micro_batch_size: int, settle_saves: Callable[[], int]) -> None:
        self._counter = counter
        self._micro_batch_size = micro_batch_size
        self._settle_saves = settle_saves

    def after_step(self, step: DoneStep) -> Action:
        """Count the step; a bad one is recorded with its rows.

        Raises:
            NonFiniteLossError: it was one bad step too many, or it has changed the weights.
        """
        result = step.result
        if self._counter.note(step.number, result.loss, result.grad_norm, is_skipped=result.is_skipped):
            last_saved = self._settle_saves()
            rows = self._find_rows(step)
            if collectives.rank() == 0:
                self._counter.write_down(step.number, result.loss, result.grad_norm, rows)
            self._counter.check_limit(step.number, last_saved)
        return Action.CONTINUE

    def _find_rows(self, step: DoneStep) -> list[tuple[int, int]]:
        """First and last + 1 of the rows whose loss was non-finite, or of all rows of the step if none was."""
        shares = collectives.gather_objects(step.result.bad_micro_batches)
        size = self._micro_batch_size
        bad_micro_batches = sorted({number for share in shares for number in share})
        return [(number * size, (number + 1) * size) for number in bad_micro_batches] or [
            (step.first_row, step.end_row)
        ]
