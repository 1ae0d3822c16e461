"""The nodes of a run whose ranks `taco train --processes` starts: how many there are, and which one this is."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from pretrain.errors import ConfigError
from pretrain.parallel.launch import Launch
from pretrain.parallel.meeting import read_address

# torchrun's own spelling of its options as variables, and what people and operators export for scripts.
_COUNTS = ("NNODES", "PET_NNODES")
_RANKS = ("NODE_RANK", "GROUP_RANK", "PET_NODE_RANK")


@dataclass(frozen=True)
class Nodes:
    """The machines of a run; on one machine there is no address to agree on (port 0: any that is free)."""

    count: int = 1
    rank: int = 0
    address: str = "127.0.0.1"
    port: int = 0

    def launch(self, processes: int) -> Launch:
        """The place of this node's first rank, where each node has `processes` of them."""
        return Launch(self.rank * processes, self.count * processes, 0, processes)


def read_nodes(asked: int | None = None, environment: Mapping[str, str] | None = None) -> Nodes:
    """This machine's place among those that srun or somebody else has started a launcher on.

    Args:
        asked: the number of nodes on the command line; None: that of the job step of SLURM, or of NNODES, or one.

    Raises:
        ConfigError: this process is a rank already, two launchers run on one node, or a variable is missing or wrong.
    """
    variables = os.environ if environment is None else environment
    if variables.get("RANK"):
        raise ConfigError(
            f"--processes starts the ranks of a run, but this process is rank {variables['RANK']} already (RANK is set "
            "by torchrun, srun with slurm/task.sh, or you); leave out --processes, or start without them and unset RANK"
        )
    step_nodes = _number(variables, "SLURM_STEP_NUM_NODES")
    if step_nodes is not None and not _is_interactive(variables):
        return _of_slurm(asked, step_nodes, variables)
    count = asked if asked is not None else _first(variables, _COUNTS)
    if count is None or count == 1:
        return Nodes()
    if variables.get("SLURM_JOB_ID") and _first(variables, _RANKS) is None:
        raise ConfigError(
            f"--nodes {count}: this is one process on one node of a SLURM job; start one on each node: "
            f"srun --nodes={count} --ntasks-per-node=1 taco train --processes N ..."
        )
    rank = _first(variables, _RANKS)
    if rank is None:
        raise ConfigError(
            f"--nodes {count}: which node this is, is not known; set NODE_RANK (0 to {count - 1}) on each of them, and "
            "MASTER_ADDR and MASTER_PORT alike on all"
        )
    given = {name: variables.get(name) or variables.get(f"PET_{name}", "") for name in ("MASTER_ADDR", "MASTER_PORT")}
    return _checked(count, rank, *read_address(given))


def _of_slurm(asked: int | None, count: int, variables: Mapping[str, str]) -> Nodes:
    tasks = _number(variables, "SLURM_STEP_NUM_TASKS") or 1
    if tasks != count:
        raise ConfigError(
            f"srun has started {tasks} tasks on {count} nodes, and each of them would start ranks; --processes wants "
            "one task per node: srun --ntasks-per-node=1 taco train --processes N ..."
        )
    if asked is not None and asked != count:
        raise ConfigError(
            f"--nodes {asked}: this step of the SLURM job has {count} nodes; leave out --nodes, or --nodes {count}"
        )
    if count == 1:
        return Nodes()
    names = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST", "")
    job = _number(variables, "SLURM_JOB_ID") or 0
    address = variables.get("MASTER_ADDR") or first_node(names)
    # Jobs that share a node must not share a port; those below 32768 are not handed out to outgoing connections.
    port = variables.get("MASTER_PORT") or str(10_000 + job % 20_000)
    return _checked(
        count,
        _number(variables, "SLURM_NODEID") or 0,
        *read_address({"MASTER_ADDR": address, "MASTER_PORT": port}),
    )


def first_node(names: str) -> str:
    """The first name of SLURM's list of nodes: `gpu[03-05,9],login` begins with `gpu03`."""
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", names)
    return "" if found is None else "".join(part or "" for part in found.groups())


def _checked(count: int, rank: int, address: str, port: int) -> Nodes:
    if not 0 <= rank < count:
        raise ConfigError(
            f"--nodes {count}: this node says that it is number {rank}; NODE_RANK counts from 0 to {count - 1}"
        )
    return Nodes(count, rank, address, port)


def _is_interactive(variables: Mapping[str, str]) -> bool:
    """Whether this is the shell that salloc has opened, which is a step of one task by itself."""
    return variables.get("SLURM_STEP_ID") == "4294967290"


def _first(variables: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    for name in names:
        if variables.get(name):
            return _number(variables, name)
    return None


def _number(variables: Mapping[str, str], name: str) -> int | None:
    text = variables.get(name)
    if not text:
        return None
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"environment: {name}={text} is no whole number; set one, or unset it")
    return int(text)
