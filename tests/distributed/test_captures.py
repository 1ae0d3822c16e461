"""What is captured stays as it was while training goes on, in every kind of layout; values that are no numbers show."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from forked import run_ranks
from moves import start_engine
from parity import load, take_steps

from pretrain.checkpoint.state_files import MOMENTS, WEIGHT
from pretrain.config.sections import RunConfig
from pretrain.engine.engine import Engine
from pretrain.parallel import collectives
from pretrain.parallel.launch import read_launch, start_process_group

pytestmark = pytest.mark.slow

OFFLOADED = "zero.offload_optimizer={device: cpu}"
LAYOUTS = {
    "one rank": (1, "zero.stage=0"),
    "DP2 ZeRO-0": (2, "zero.stage=0"),
    "DP2 ZeRO-1": (2, "zero.stage=1"),
    "DP2 ZeRO-1 offloaded": (2, "zero.stage=1", OFFLOADED),
    "DP2 ZeRO-2 bf16": (2, "zero.stage=2", "precision=bf16"),
    "DP2 ZeRO-3": (2, "zero.stage=3"),
    "DP2 ZeRO-3 bf16, all offloaded": (
        2,
        "zero.stage=3",
        "precision=bf16",
        OFFLOADED,
        "zero.offload_param={device: cpu}",
    ),
    "TP2": (2, "parallel.tensor=2"),
    "PP2": (2, "parallel.pipeline=2"),
}


@pytest.fixture(scope="module", autouse=True)
def _import_megatron_once() -> None:
    import megatron.core.tensor_parallel  # noqa: F401  # before the ranks fork


def capture_and_train_on(config: RunConfig, folder: Path) -> list[str | None]:
    """One rank: twice write the state at once, and a copy of it two steps later; then what poison is found."""
    engine, source = start_engine(config)
    engine.reserve_copies()
    assert engine.capture_state(copies=True).problem is None  # before the first step
    for first in (0, 4):
        take_steps(engine, source, first, first + 2)
        engine.save_state(folder / f"at once {first}")
        captured = engine.capture_state(copies=True)
        take_steps(engine, source, first + 2, first + 4)
        captured.write(folder / f"later {first}")
    return poison_each_kind(engine)


def poison_each_kind(engine: Engine) -> list[str | None]:
    """What is found when a value of this rank's last range of each kind is no number, and in the end without one."""
    found = []
    for kind in (WEIGHT, *MOMENTS):
        place = [candidate for candidate in engine.state.ranges() if candidate.kind == kind][-1]
        values = engine.state.values(place)
        kept = float(values[-1])
        values[-1] = math.nan
        found.append(engine.capture_state(copies=True).problem)
        values[-1] = kept
    return [*found, engine.capture_state(copies=False).problem]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_copy_is_not_changed_by_the_steps_that_follow(name: str, tmp_path: Path) -> None:
    world_size, *layout = LAYOUTS[name]
    for kind in ("at once", "later"):
        for first in (0, 4):
            (tmp_path / f"{kind} {first}").mkdir()
    found = run_ranks(world_size, capture_and_train_on, load(tmp_path, *layout), tmp_path)
    for first in (0, 4):
        expected, written = (files_of(tmp_path / f"{kind} {first}") for kind in ("at once", "later"))
        assert len(expected) == world_size + 1
        assert written == expected
    assert files_of(tmp_path / "later 0") != files_of(tmp_path / "later 4")
    for weight, first_moment, second_moment, nothing in found:
        for words, problem in (("weight", weight), ("first moment", first_moment), ("second moment", second_moment)):
            assert problem.startswith(f"{words} of ")
            assert ": 1 of the " in problem
        assert nothing is None


def files_of(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((checkpoint / "state").iterdir())}


def test_votes_of_two_groups_do_not_wait_for_each_other() -> None:
    assert run_ranks(2, vote_in_two_groups) == [("rank 1: late", "rank 0: early")] * 2


def vote_in_two_groups() -> tuple[str | None, str | None]:
    """Rank 0 votes in the side group first, rank 1 last: in one group that would mix the two votes."""
    import threading

    import torch

    start_process_group(read_launch(), torch.device("cpu"))
    group, rank = collectives.start_side_group(), collectives.rank()
    side: list[str | None] = []
    thread = threading.Thread(
        target=lambda: side.append(collectives.first_failure("early" if rank == 0 else None, group))
    )
    if rank == 0:
        thread.start()
    main = collectives.first_failure("late" if rank == 1 else None)
    if rank == 1:
        thread.start()
    thread.join()
    return main, side[0]
