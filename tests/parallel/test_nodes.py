"""Which nodes a launcher finds in its environment."""

from __future__ import annotations

import pytest

from pretrain.errors import ConfigError
from pretrain.parallel.launch import Launch
from pretrain.parallel.nodes import Nodes, first_node, read_nodes

STEP = {
    "SLURM_JOB_ID": "31234",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[07,12]",
    "SLURM_NTASKS": "2",
}
TWO = {"NODE_RANK": "1", "MASTER_ADDR": "first", "MASTER_PORT": "1234"}


@pytest.mark.parametrize(
    ("asked", "variables", "nodes"),
    [
        (None, {}, Nodes()),
        (1, {"MASTER_ADDR": "first", "MASTER_PORT": "1234"}, Nodes()),
        (None, {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NTASKS": "2"}, Nodes()),  # a shell, not a step
        (None, STEP, Nodes(2, 1, "gpu07", 21234)),
        (2, STEP | {"MASTER_ADDR": "other", "MASTER_PORT": "99"}, Nodes(2, 1, "other", 99)),
        (None, STEP | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"}, Nodes()),
        (2, TWO, Nodes(2, 1, "first", 1234)),
        (None, TWO | {"NNODES": "2"}, Nodes(2, 1, "first", 1234)),
        (None, {"PET_NNODES": "3", **{f"PET_{name}": text for name, text in TWO.items()}}, Nodes(3, 1, "first", 1234)),
    ],
)
def test_nodes(asked: int | None, variables: dict[str, str], nodes: Nodes) -> None:
    assert read_nodes(asked, variables) == nodes


@pytest.mark.parametrize(
    ("asked", "variables", "words"),
    [
        (None, {"RANK": "1"}, "this process is rank 1 already"),
        (2, {}, "set NODE_RANK"),
        (
            2,
            {"NODE_RANK": "2", **{name: TWO[name] for name in ("MASTER_ADDR", "MASTER_PORT")}},
            "NODE_RANK counts from 0 to 1",
        ),
        (2, {"NODE_RANK": "1"}, "MASTER_ADDR, MASTER_PORT missing"),
        (2, {"NODE_RANK": "one"}, "NODE_RANK=one is no whole number"),
        (2, {"SLURM_JOB_ID": "7"}, "srun --nodes=2 --ntasks-per-node=1"),
        (4, STEP, "has 2 nodes"),
        (None, STEP | {"SLURM_STEP_NUM_TASKS": "8"}, "srun has started 8 tasks on 2 nodes"),
    ],
)
def test_what_does_not_fit_is_refused(asked: int | None, variables: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_nodes(asked, variables)


@pytest.mark.parametrize(
    ("names", "first"),
    [("gpu03", "gpu03"), ("gpu03,x", "gpu03"), ("gpu[03-05,9],x", "gpu03"), ("n[1,2]-ib", "n1-ib"), ("", "")],
)
def test_first_node_of_slurms_list(names: str, first: str) -> None:
    assert first_node(names) == first


def test_ranks_are_counted_through_the_nodes() -> None:
    assert Nodes(3, 2, "first", 1).launch(8) == Launch(16, 24, 0, 8)
