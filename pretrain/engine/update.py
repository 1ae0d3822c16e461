"""The optimizer's step under every ZeRO stage: one norm, one verdict, and one report that the host reads.

DeepSpeed gives the step its place in the training; what happens in it is ours where it can be. Without ZeRO and under
ZeRO-1 and 2 (`own_update.py`) the verdict stays on the device: the optimizer is queued before the host knows whether it
will change anything. Under ZeRO-3, and wherever optimizer state is offloaded, DeepSpeed's own step runs
(`answered_update.py`); its questions about finite values and norms are answered from the report, which the host must
then read first.

What is replaced are methods of DeepSpeed's objects. One that is missing, in a version that we do not know, ends the run
in words (`require`): the slow path would otherwise return unseen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pretrain.engine.step_report import PendingReport, Report
from pretrain.engine.verdict import Verdict, judge
from pretrain.engine.zero_state import ZeroState
from pretrain.errors import TacoError
from pretrain.optim import Holdable, is_tensor_parallel, squared_norm
from pretrain.parallel.mesh import Mesh


class Update(ABC):
    """One step of the optimizer, from the gradients of the last backward pass to new weights.

    Args:
        engine: DeepSpeed's.
        state: where its optimizer keeps weights and moments.
        hold: the optimizer, whose step can be held.
        max_norm: gradients are clipped to this norm; 0: never.

    Attributes:
        is_queued: whether the verdict stays on the device; otherwise the host reads the report before the update.
    """

    is_queued = False

    def __init__(self, engine: Any, state: ZeroState, hold: Holdable, mesh: Mesh, max_norm: float) -> None:
        self.engine = engine
        self.wrapper = engine.optimizer
        self.state = state
        self.mesh = mesh
        self.max_norm = max_norm
        self._hold = hold
        self._verdict: Verdict | None = None
        self._keeps_weights = False

    @contextmanager
    def collecting(self, *, is_last: bool) -> Iterator[None]:
        """Around the backward pass of a micro-batch; `is_last`: the last one of the step."""
        yield

    @abstractmethod
    def squares(self) -> Tensor:
        """This rank's share of the sum of squares of the gradients of all ranks, as they are; 0 dimensions, fp64."""

    @contextmanager
    def running(self, pending: PendingReport, *, keep_weights: bool) -> Iterator[None]:
        """While this context lasts, DeepSpeed's step does what the report says; `keep_weights`: without an update."""
        squares = pending.squares if self.is_queued else torch.tensor(pending.read().squares, dtype=torch.float64)
        self._verdict = judge(squares, loss_scale=self._loss_scale(), max_norm=self.max_norm)
        self._keeps_weights = keep_weights
        with self._hold.held(keep_weights):
            yield
        self._verdict = None

    @abstractmethod
    def settle(self, report: Report) -> tuple[float, bool]:
        """Bring DeepSpeed's counters and the loss scale up to date, once the report is known.

        Returns:
            The norm of the gradients, infinite if one is not finite, and whether the weights were to change.
        """

    @property
    def _given(self) -> Verdict:
        """The verdict over the step that is running."""
        if self._verdict is None:
            raise RuntimeError("DeepSpeed's optimizer has stepped before the report of the step was there")
        return self._verdict

    def _loss_scale(self) -> float:
        return float(getattr(self.wrapper, "loss_scale", 1.0))

    def _is_counted(self, parameter: Tensor) -> bool:
        """False for what another rank of the same model counts: copies of a tensor-parallel rank or of a stage."""
        is_copy = self.mesh.tp_rank > 0 and not is_tensor_parallel(parameter)
        return not (is_copy or getattr(parameter, "ds_pipe_replicated", False))


def weighed_squares(counted: list[Tensor], copies: list[Tensor]) -> Tensor:
    """The sum of squares of what counts; copies add nothing to it, but it is not finite if they are not."""
    total = squared_norm(counted)
    return total + 0.0 * squared_norm(copies).to(total.device) if copies else total


def require(owner: Any, *names: str) -> None:
    """Refuse a version of DeepSpeed in which `owner` lacks one of `names`."""
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        import deepspeed

        raise TacoError(
            f"DeepSpeed {deepspeed.__version__}: {type(owner).__name__} has no {', '.join(missing)}, which training "
            "replaces; install the version that constraints.txt names"
        )
