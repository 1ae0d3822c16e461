"""The interface of one optimizer step: what is requested of it, its result, and the watchers that see both.

Watchers are attached to the training loop. Every rank has the same ones in the same order, so they may call collectives
together. A new one (a probe, a meter of an objective) goes into the list in `build_run.py`; the loop stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum


@dataclass
class StepPlan:
    """What watchers request of the next step; they fill it in `before_step`.

    Attributes:
        number: of the optimizer step, counted from 1.
        requests: by name, whether this rank makes the request; it counts for all ranks if one of them makes it.
        work_seconds: this rank's own work per step, shared with all ranks; either all ranks give it or none.
        may_not_update: gets the loss of the step, the same on all ranks, and says whether to leave weights unchanged.
    """

    number: int
    requests: dict[str, bool] = field(default_factory=dict)
    work_seconds: float | None = None
    may_not_update: Callable[[float], bool] | None = None


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank.

    The MLM loss is the mean over all masked tokens of the step, or over micro-batches (`mlm.average`); the contrastive
    loss is the mean over micro-batches, and the loss is their weighted sum.

    Attributes:
        is_skipped: no weight has changed, because a gradient was non-finite or `may_not_update` said so.
        num_skipped: such steps of the run up to here, in earlier starts too; those that a rollback has undone are out.
        requests: the names of the requests that any rank made.
        bad_micro_batches: global numbers of this rank's own micro-batches whose loss was non-finite; the one field that
            differs between ranks.
        work_seconds: what each rank gave, in rank order.
    """

    loss: float
    mlm_loss: float
    contrastive_loss: float
    grad_norm: float
    is_skipped: bool
    num_skipped: int = 0
    requests: frozenset[str] = frozenset()
    bad_micro_batches: tuple[int, ...] = ()
    work_seconds: tuple[float, ...] = ()


@dataclass(frozen=True)
class DoneStep:
    """A finished step: its number, counted from 1, its rows of the training stream, and its result."""

    number: int
    first_row: int
    end_row: int
    result: StepResult


class Action(IntEnum):
    """What a watcher requests of the trainer after a step; of several actions the largest counts."""

    CONTINUE = 0
    SAVE = 1
    STOP = 2
    """Save, and end the run; the same command continues it."""
    ROLL_BACK = 3
    """Return to a checkpoint at once: later watchers do not see this step."""


class Watcher:
    """Sees every step before and after; a subclass overrides what it needs."""

    def before_step(self, plan: StepPlan) -> None:
        """Request something of the step that is about to begin."""

    def after_step(self, step: DoneStep) -> Action:
        """Look at a finished step, and say what the trainer must do.

        Raises:
            TacoError: the run cannot continue.
        """
        return Action.CONTINUE
