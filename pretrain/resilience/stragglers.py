"""Ranks that are slower than the others, named before they become a hang.

Every rank adds up the time of those stages in which no other rank can delay it, and tells it with the losses of every
`train.log_every`-th step: no collective and no wait is added. Stages of a pipeline have different work, so a rank is
compared with those of its own stage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median

from pretrain.metrics import MetricsLog
from pretrain.parallel import collectives
from pretrain.resilience.heartbeat import Heartbeat
from pretrain.runlog import get_logger
from pretrain.step import Action, DoneStep, StepPlan, Watcher

# A difference that is less of a step delays nobody noticeably, whatever its share of the work.
_SHARE_OF_STEP = 0.05
# Slow for so many intervals in a row: not a moment in which the machine did something else.
_INTERVALS = 3

log = get_logger(__name__)


class Stragglers(Watcher):
    """What rank 0 says of slow ranks: a warning when one stays slow, a record as long as it is.

    Args:
        slow_share: of the median work by which a slow rank exceeds it.
        hosts: of all ranks.
        num_stages: of the pipeline; ranks of a stage follow each other.
        heartbeat: measures this rank's own work.
        every: how many steps apart the ranks compare their work.
    """

    def __init__(
        self,
        slow_share: float,
        hosts: Sequence[str],
        num_stages: int,
        metrics: MetricsLog,
        heartbeat: Heartbeat,
        every: int,
    ) -> None:
        self.slow_share = slow_share
        self.hosts = hosts
        self._per_stage = len(hosts) // num_stages
        self._metrics = metrics
        self._heartbeat = heartbeat
        self._every = every
        self._step_seconds = 0.0
        self._in_a_row: Counter[int] = Counter()

    def before_step(self, plan: StepPlan) -> None:
        """On every `every`-th step, share what this rank has worked since the last of them."""
        if plan.number % self._every == 0:
            plan.work_seconds, self._step_seconds = self._heartbeat.take_work()

    def after_step(self, step: DoneStep) -> Action:
        """Compare the work of all ranks where they have shared it."""
        if step.result.work_seconds and collectives.rank() == 0:
            self.note(step.number, step.result.work_seconds, self._step_seconds)
        return Action.CONTINUE

    def note(self, step: int, work_seconds: Sequence[float], step_seconds: float) -> None:
        """Take the work of every rank per step, and the duration of a step, on average since the last call."""
        slow = self.find(work_seconds, step_seconds)
        for rank in self._in_a_row.keys() - slow.keys():
            if self._in_a_row.pop(rank) >= _INTERVALS:
                log.info("step %d: rank %d on %s is as fast as its peers again", step, rank, self.hosts[rank])
        for rank, (share, usual) in slow.items():
            self._in_a_row[rank] += 1
            if self._in_a_row[rank] < _INTERVALS:
                continue
            self._metrics.write(
                {"step": step, "slow_rank": rank, "slow_host": self.hosts[rank], "slow_share": round(share, 3)}
            )
            if self._in_a_row[rank] == _INTERVALS:
                log.warning(
                    "step %d: rank %d on %s is slow: %.3g s of its own work per step, %.0f %% more than the median "
                    "(%.3g s) of its peers, and all ranks wait for it",
                    step, rank, self.hosts[rank], work_seconds[rank], 100 * share, usual,
                )  # fmt: skip

    def find(self, work_seconds: Sequence[float], step_seconds: float) -> dict[int, tuple[float, float]]:
        """Slow ranks: by which share each exceeds the median of its peers, and that median in seconds."""
        slow = {}
        for rank, seconds in enumerate(work_seconds):
            first = rank // self._per_stage * self._per_stage
            peers = [work_seconds[peer] for peer in range(first, first + self._per_stage) if peer != rank]
            usual = median(peers) if peers else seconds
            excess = seconds - usual
            if excess > self.slow_share * usual and excess > _SHARE_OF_STEP * step_seconds:
                slow[rank] = (excess / usual if usual else 1.0, usual)
        return slow
