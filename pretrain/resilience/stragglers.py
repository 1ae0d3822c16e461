"""Names ranks that are slower than the others, before they become a hang.

Every rank adds up the time of the stages in which no other rank can delay it, and shares it with the losses of every
`train.log_every`-th step: this adds no collective and no wait. Pipeline stages have different work, so a rank is
compared with the ranks of its own stage.
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

# A smaller share of a step than this delays nobody noticeably, whatever its share of the work.
_SHARE_OF_STEP = 0.05
# A rank must be slow for this many intervals in a row: a machine may be busy with something else for a moment.
_INTERVALS = 3

log = get_logger(__name__)


class Stragglers(Watcher):
    """Rank 0's reports of slow ranks: a warning when one stays slow, a record for as long as it is.

    Args:
        slow_share: share of the median work by which a slow rank exceeds the median.
        hosts: host name of each rank.
        num_stages: stages of the pipeline; the ranks of a stage are consecutive.
        heartbeat: measures this rank's own work.
        every: steps between two comparisons of the ranks' work.
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
        """On every `every`-th step, share this rank's work since the last such step."""
        if plan.number % self._every == 0:
            plan.work_seconds, self._step_seconds = self._heartbeat.take_work()

    def after_step(self, step: DoneStep) -> Action:
        """Compare the work of all ranks if they have shared it."""
        if step.result.work_seconds and collectives.rank() == 0:
            self.note(step.number, step.result.work_seconds, self._step_seconds)
        return Action.CONTINUE

    def note(self, step: int, work_seconds: Sequence[float], step_seconds: float) -> None:
        """Judge the work of every rank per step, given with the duration of a step, averaged since the last call."""
        slow = self.find(work_seconds, step_seconds)
        for rank in self._in_a_row.keys() - slow.keys():
            if self._in_a_row.pop(rank) >= _INTERVALS:
                log.info("step %d: rank %d on %s is as fast as its peers again", step, rank, self.hosts[rank])
        for rank, (share, peer_median) in slow.items():
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
                    step, rank, self.hosts[rank], work_seconds[rank], 100 * share, peer_median,
                )  # fmt: skip

    def find(self, work_seconds: Sequence[float], step_seconds: float) -> dict[int, tuple[float, float]]:
        """Slow ranks: the share by which each exceeds the median of its peers, and that median in seconds."""
        slow = {}
        for rank, seconds in enumerate(work_seconds):
            first = rank // self._per_stage * self._per_stage
            peers = [work_seconds[peer] for peer in range(first, first + self._per_stage) if peer != rank]
            peer_median = median(peers) if peers else seconds
            excess = seconds - peer_median
            if excess > self.slow_share * peer_median and excess > _SHARE_OF_STEP * step_seconds:
                slow[rank] = (excess / peer_median if peer_median else 1.0, peer_median)
        return slow
