"""A bit of one rank's weights flips in a run: it ends on all ranks, saves nothing of it, and a new start repairs it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_ranks
from live_ranks import run_training
from small_runs import write_small_run

from pretrain.checkpoint.manifest import CheckpointManifest, find_problems, list_checkpoints
from pretrain.engine.engine import Engine

pytestmark = pytest.mark.slow

NAME = "2.attention_norm.weight"
SAVE_EVERY = 3


def run_rank(arguments: list[str], flip: tuple[int, int] | None) -> tuple[object, str]:
    """The training program as one rank: exit code and errors. A bit flips after step `flip[0]` on rank `flip[1]`."""
    if flip is not None and int(os.environ["RANK"]) == flip[1]:
        Engine.train_step = _flipping(Engine.train_step, flip[0])  # type: ignore[method-assign]
    return run_training(arguments)


def _flipping(train_step: Callable[..., Any], step: int) -> Callable[..., Any]:
    steps = iter(range(1, 1000))

    def call(engine: Engine, *args: Any, **kwargs: Any) -> Any:
        result = train_step(engine, *args, **kwargs)
        if next(steps) == step:
            dict(engine.engine.module.named_parameters())[NAME].data.view(torch.int32)[0] ^= 1 << 20
        return result

    return call


def state_hashes(run: Path) -> dict[str, str]:
    manifest = CheckpointManifest.load(list_checkpoints(run / "checkpoints")[0])
    return {record.name: record.xxh3_128 for record in manifest.files if record.name.startswith("state/")}


@pytest.mark.fault("drift")
@pytest.mark.parametrize(
    ("layout", "every", "flip", "found_at", "words"),
    [
        (("zero.stage=0",), 4, (4, 1), 4, f"{NAME} differs between rank 0 and rank 1"),
        (("zero.stage=1",), 1000, (6, 0), 6, f"{NAME} differs between rank 0 and rank 1"),
        # Used for a step, it has spoilt the gradients of everything that the two ranks should have alike.
        (("parallel.tensor=2",), 5, (4, 1), 5, "differs between rank 0 and rank 1; and "),
    ],
    ids=["DP2, between saves", "DP2, before a save", "TP2, a step later"],
)
def test_a_flipped_bit_ends_the_run_and_a_new_start_repairs_it(
    layout: tuple[str, ...], every: int, flip: tuple[int, int], found_at: int, words: str, tmp_path: Path
) -> None:
    import megatron.core.tensor_parallel  # noqa: F401  # before the ranks fork

    config = write_small_run(tmp_path, checkpoint={"every_steps": SAVE_EVERY})
    clean = ["--config", str(config), *layout, f"run.output_dir={tmp_path / 'clean'}"]
    hit = ["--config", str(config), *layout, f"run.output_dir={tmp_path / 'hit'}", f"train.replica_check_every={every}"]
    assert [code for code, _ in run_ranks(2, run_rank, clean, None)] == [0, 0]
    for code, errors in run_ranks(2, run_rank, hit, flip):
        print(errors.splitlines()[-1])
        assert code == 1
        assert words in errors
        assert f"step {found_at}: " in errors
        assert f"the last checkpoint is of step {SAVE_EVERY}" in errors
    saved = list_checkpoints(tmp_path / "hit" / "checkpoints")
    assert [CheckpointManifest.load(folder).step for folder in saved] == [SAVE_EVERY]
    assert find_problems(saved[0]) == []
    assert [code for code, _ in run_ranks(2, run_rank, hit, None)] == [0, 0]
    assert state_hashes(tmp_path / "hit") == state_hashes(tmp_path / "clean")


def test_it_can_be_turned_off(tmp_path: Path) -> None:
    arguments = ["--config", str(write_small_run(tmp_path)), "zero.stage=0", "train.replica_check_every=null"]
    assert [code for code, _ in run_ranks(2, run_rank, arguments, (4, 1))] == [0, 0]
