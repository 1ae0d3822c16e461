"""Loss spikes: what counts as one, and what happens then.

A loss is a spike if it exceeds the mean of the previous steps by `spike.sigmas` standard deviations, once there have
been `spike.window` of them. Mean and variance are exponentially weighted, and a spike enters them as if it were at the
bound: one outlier moves the bound little, and a loss that stays high becomes the new normal in the end. The losses are
the same on every rank, so all ranks decide alike without communicating; the history is part of every checkpoint, so a
run that was killed decides as if it had not been.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain import durable
from pretrain.config.sections import SpikeSection
from pretrain.errors import TacoError
from pretrain.parallel import collectives
from pretrain.runlog import get_logger
from pretrain.step import Action, DoneStep, StepPlan, Watcher

SPIKES_FILE = "spikes.jsonl"
# In a very smooth run a change that nobody would call a spike spans many standard deviations.
_LEAST_DEVIATION = 0.01

log = get_logger(__name__)


class TooManySpikesError(TacoError):
    """The run was rolled back as often as it may be, and the loss spikes again."""


@dataclass
class SpikeHistory:
    """Statistics of the losses so far, in plain numbers that a checkpoint holds.

    `skipped_rows`: first and one past the last row of the training stream of each span that a rollback left out.
    """

    num_steps: int = 0
    mean: float = 0.0
    variance: float = 0.0
    num_rollbacks: int = 0
    skipped_rows: list[list[int]] = field(default_factory=list)


class Spikes(Watcher):
    """Compares every loss with those before it, and acts as `spike.policy` says.

    Attributes:
        newest: the record of the newest spike.
    """

    def __init__(self, section: SpikeSection, folder: Path) -> None:
        self.section = section
        self.history = SpikeHistory()
        self.newest: dict[str, Any] = {}
        self._file = folder / SPIKES_FILE

    def before_step(self, plan: StepPlan) -> None:
        """Under the policy "skip", let no spike change a weight."""
        if self.section.policy == "skip":
            plan.may_not_update = self.is_spike

    def after_step(self, step: DoneStep) -> Action:
        """Add the loss of a step; report a spike, or ask for a rollback under that policy.

        Raises:
            TooManySpikesError: the run was rolled back as often as it may be.
        """
        loss, bound = step.result.loss, self.bound
        is_spike = self.is_spike(loss)
        self.add(loss)
        if not is_spike:
            return Action.CONTINUE
        rows = [step.first_row, step.end_row]
        self.newest = {"step": step.number, "loss": loss, "bound": bound, "rows": rows, "action": self.section.policy}
        if self.section.policy == "rollback":
            self.check_limit(step.number, loss)
            return Action.ROLL_BACK
        self.report()
        return Action.CONTINUE

    def report(self, **changes: Any) -> None:
        """Report what became of the newest spike, on the console and, by rank 0, in spikes.jsonl."""
        record = self.newest | changes
        log.warning(
            "step %d: loss %.4f is a spike (bound %.4f): %s",
            record["step"],
            record["loss"],
            record["bound"],
            _describe_action(record),
        )
        if collectives.rank() == 0:
            self.write_down(record)

    @property
    def bound(self) -> float:
        """The loss above which a step is a spike; infinity until there are enough steps, or if the policy is "off"."""
        history = self.history
        if self.section.policy == "off" or history.num_steps < self.section.window:
            return math.inf
        deviation = max(math.sqrt(history.variance), _LEAST_DEVIATION * abs(history.mean))
        return history.mean + self.section.sigmas * deviation

    def is_spike(self, loss: float) -> bool:
        """Whether a step with this loss would be one; NaN and infinity are bad steps, not spikes."""
        return math.isfinite(loss) and loss > self.bound

    def add(self, loss: float) -> None:
        """Add the loss of a step to mean and variance (exponentially weighted; West 1979 for the variance)."""
        if not math.isfinite(loss):
            return
        history, loss = self.history, min(loss, self.bound)
        history.num_steps += 1
        weight = 1 / min(history.num_steps, self.section.window)
        change = loss - history.mean
        history.mean += weight * change
        history.variance = (1 - weight) * (history.variance + weight * change**2)

    def roll_back(self, saved: Mapping[str, Any], skipped_rows: tuple[int, int]) -> None:
        """Restore the history of a checkpoint, and count this return to it."""
        past = self.history
        self.restore(saved)
        self.history.num_rollbacks = past.num_rollbacks + 1
        self.history.skipped_rows = [*past.skipped_rows, list(skipped_rows)]

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Continue with the history of a checkpoint; it is empty if an older release wrote none."""
        self.history = SpikeHistory(**saved)

    def check_limit(self, step: int, loss: float) -> None:
        """End a run that has been rolled back too often.

        Raises:
            TooManySpikesError: with what to do.
        """
        if self.history.num_rollbacks >= self.section.max_rollbacks:
            raise TooManySpikesError(
                f"step {step}: loss {loss:.4f} is above {self.bound:.4f}, and the run was rolled back "
                f"{self.history.num_rollbacks} times already (spike.max_rollbacks); none of this is saved; look at "
                f"{self._file}, lower optim.lr, or raise the limit with --allow-change spike"
            )

    def write_down(self, record: Mapping[str, Any]) -> None:
        """Append a spike to spikes.jsonl; rank 0 calls it."""
        try:
            durable.append_line(self._file, json.dumps(record).encode())
        except OSError as error:
            log.warning("a loss spike could not be recorded: %s", error)


def _describe_action(record: Mapping[str, Any]) -> str:
    if "continued_from" in record:
        first, stop = record["skipped_rows"]
        return f"back to the checkpoint of step {record['continued_from']}, leaving out rows {first} to {stop - 1}"
    if record["action"] == "skip":
        return "no weight has changed"
    return str(record.get("reason", "the run continues with it (spike.policy)"))
