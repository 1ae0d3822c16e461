"""torch's elastic agent as this launcher uses it: no restarts, no signal handlers, a meeting point of our own."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from pretrain.launcher.rank_ends import RankEnds
from pretrain.parallel.meeting import Party, meet
from pretrain.parallel.nodes import Nodes

_LOOK_SECONDS = 0.1
# After the last step: how long the first node keeps the store for the others.
_LAST_NODE_SECONDS = 60.0


def start_agent(
    command: Sequence[str], num_processes: int, nodes: Nodes, ends: RankEnds, folder: Path, timeout: timedelta
) -> RankAgent:
    """An agent that will run this Python with `command` as `num_processes` ranks; `run` starts them and waits.

    Args:
        ends: is told how ranks end.
        folder: for the agent's own files.
        timeout: how long nodes wait for each other.
    """
    # It reports every signal and exit code in lines of its own; the launcher says what people need to know.
    logger = logging.getLogger("torch.distributed.elastic")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False
    spec = WorkerSpec(
        role="taco",
        local_world_size=num_processes,
        rdzv_handler=_MeetingOfNodes(nodes, timeout),
        entrypoint=sys.executable,
        args=tuple(argument.replace("$", "$$") for argument in command),  # it fills in ${local_rank}
        max_restarts=0,
        monitor_interval=_LOOK_SECONDS,
    )
    return RankAgent(spec, DefaultLogsSpecs(log_dir=str(folder)), ends)


class RankAgent(LocalElasticAgent):
    """Starts ranks; `processes` are theirs by rank, once they have been started."""

    def __init__(self, spec: WorkerSpec, logs_specs: DefaultLogsSpecs, ends: RankEnds) -> None:
        super().__init__(spec, logs_specs, exit_barrier_timeout=_LAST_NODE_SECONDS)
        self.processes: dict[int, int] = {}
        self._ends = ends

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        pids: dict[int, Any] = super()._start_workers(worker_group)
        ranks = {worker.local_rank: worker.global_rank for worker in worker_group.workers}
        self.processes = {ranks[local_rank]: int(pid) for local_rank, pid in pids.items()}
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """Let the agent look only when no rank runs any more: as soon as one has failed it would signal the others."""
        if not self._ends.have_all_ended(self.processes):
            return RunResult(state=WorkerState.HEALTHY)
        result: RunResult = super()._monitor_workers(worker_group)
        return result


class _MeetingOfNodes(RendezvousHandler):
    """Launchers of all nodes meet at a store on the first one, which serves the ranks too."""

    def __init__(self, nodes: Nodes, timeout: timedelta) -> None:
        self._nodes, self._timeout = nodes, timeout
        self._store: TCPStore | None = None

    def next_rendezvous(self) -> RendezvousInfo:
        nodes = self._nodes
        if nodes.count == 1:
            self._store = TCPStore(nodes.address, 0, None, True, self._timeout, wait_for_workers=False)
        else:
            party = Party(
                noun="node",
                index=nodes.rank,
                size=nodes.count,
                address=nodes.address,
                port=nodes.port,
                is_host=nodes.rank == 0,
                speaks=True,
            )
            self._store = meet(party, self._timeout)
        # The port is known only now: any free one was asked for.
        place = RendezvousStoreInfo(nodes.address, self._store.port)
        return RendezvousInfo(PrefixStore("taco/nodes", self._store), nodes.rank, nodes.count, place)

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return "static"

    def get_run_id(self) -> str:
        return "taco"

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Nothing to close: there is one meeting."""

    def num_nodes_waiting(self) -> int:
        return 0

    def shutdown(self) -> bool:
        return True
