"""One bit of one copy, flipped on one rank, is found and named alike on every rank, in every kind of layout."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_ranks
from layouts import DP2, DP4, NO_DROPOUT, PP2, PP2_DP2, PP2_TP2_SP, TP2, TP2_DP2, TP2_SP, Grid
from parity import build, join_mesh, load

from pretrain.config.sections import RunConfig
from pretrain.engine import engine as engine_module
from pretrain.engine.engine import Engine
from pretrain.engine.pipelined import PipelinedEngine
from pretrain.engine.plain import PlainEngine
from pretrain.optim import learning_rate

pytestmark = pytest.mark.slow

Flip = tuple[str, int]
"""A parameter, and the rank on which one of its bits flips."""
NORM, BIAS, SPLIT, WORD = "3.attention_norm.weight", "2.ffn_out.bias", "2.qkv.weight", "tied_modules.word.weight"
CASES: dict[str, tuple[Grid, int, dict[Flip, str]]] = {
    "DP2 ZeRO-0": (DP2, 0, {(NORM, 1): f"{NORM} differs between rank 0 and rank 1"}),
    "DP4 ZeRO-1": (
        DP4,
        1,
        {
            (NORM, 2): f"{NORM} on rank 2 differs from ranks 0-1, 3",
            (WORD, 0): f"{WORD} on rank 0 differs from ranks 1-3",
        },
    ),
    "DP2 ZeRO-2": (DP2, 2, {(SPLIT, 0): f"{SPLIT} differs between rank 0 and rank 1"}),
    "DP2 ZeRO-3": (DP2, 3, {(NORM, 0): f"{NORM} differs between rank 0 and rank 1"}),
    "TP2 ZeRO-1": (TP2, 1, {(BIAS, 0): f"{BIAS} differs between rank 0 and rank 1"}),
    "TP2 + SP ZeRO-1": (TP2_SP, 1, {(NORM, 1): f"{NORM} differs between rank 0 and rank 1"}),
    "TP2 x DP2 ZeRO-1": (
        TP2_DP2,
        1,
        {
            (NORM, 3): f"{NORM} on rank 3 differs from ranks 0-2",
            (SPLIT, 1): f"{SPLIT} part 1 differs between rank 1 and rank 3",
        },
    ),
    "TP2 x DP2 ZeRO-3": (TP2_DP2, 3, {(NORM, 1): f"{NORM} on rank 1 differs from ranks 0, 2-3"}),
    "PP2": (PP2, 1, {(WORD, 1): f"{WORD} differs between rank 0 and rank 1"}),
    "PP2 x DP2": (
        PP2_DP2,
        1,
        {
            (WORD, 3): f"{WORD} on rank 3 differs from ranks 0-2",
            ("2.ffn_norm.bias", 1): "2.ffn_norm.bias differs between rank 0 and rank 1",
        },
    ),
    "PP2 x TP2 + SP": (
        PP2_TP2_SP,
        1,
        {
            (WORD, 2): f"{WORD} part 0 differs between rank 0 and rank 2",
            ("2.ffn_norm.bias", 1): "2.ffn_norm.bias differs between rank 0 and rank 1",
        },
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _import_megatron_once() -> None:
    import megatron.core.tensor_parallel  # noqa: F401  # before the ranks fork


def start_engine(config: RunConfig) -> tuple[Engine, Any]:
    mesh = join_mesh(config)
    model, source = build(config, mesh)
    return (PlainEngine if mesh.pp_size == 1 else PipelinedEngine)(config, model, torch.device("cpu"), mesh), source


def step_once(engine: Engine, source: Any) -> None:
    config, mesh = engine.config, engine.mesh
    share = range(mesh.dp_rank, config.train.global_batch_size // config.train.micro_batch_size, mesh.dp_size)
    rate = learning_rate(0, config.optim, config.train.steps)
    engine.train_step([source.micro_batch(index) for index in share], learning_rate=rate)


def flip_bit(engine: Engine, name: str) -> None:
    """Change the lowest bit of the last element that this rank holds of a parameter."""
    parameter = dict(engine.engine.module.named_parameters())[name]
    is_sliced = hasattr(parameter, "ds_tensor") and not parameter.ds_persist
    held = (parameter.ds_tensor if is_sliced else parameter).data
    kept = held.numel()
    if is_sliced:
        kept = min(kept, parameter.ds_numel - engine.mesh.dp_rank * held.numel())
    held.view(torch.int32).view(-1)[kept - 1] ^= 1


def flip_each(config: RunConfig, flips: list[Flip]) -> list[list[str]]:
    """One rank: what the check finds after a step, and after each flip."""
    engine, source = start_engine(config)
    step_once(engine, source)
    found = [[str(drift) for drift in engine.find_drift()]]
    for name, rank in flips:
        for _ in range(2):  # the second flip mends the first
            if int(os.environ["RANK"]) == rank:
                flip_bit(engine, name)
            found.append([str(drift) for drift in engine.find_drift()])
    return found


@pytest.mark.parametrize("name", CASES)
def test_one_bit_on_one_rank_is_named(name: str, tmp_path: Path) -> None:
    grid, zero, flips = CASES[name]
    config = load(tmp_path, *NO_DROPOUT, "model.num_layers=2", f"zero.stage={zero}", *grid.overrides)
    expected: list[list[str]] = [[]]
    for text in flips.values():
        expected += [[text], []]
    assert run_ranks(grid.num_processes, flip_each, config, list(flips)) == [expected] * grid.num_processes


def flip_slices(config: RunConfig, flips: list[Flip]) -> list[list[str]]:
    """As `flip_each`, with every parameter sliced."""
    build_ds_config = engine_module.build_ds_config

    def slicing_all(*args: Any, **kwargs: Any) -> dict[str, Any]:
        tree = build_ds_config(*args, **kwargs)
        tree["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return tree

    engine_module.build_ds_config = slicing_all
    return flip_each(config, flips)


def test_slices_of_zero_3_are_compared_between_tensor_ranks(tmp_path: Path) -> None:
    config = load(tmp_path, *NO_DROPOUT, "model.num_layers=2", "zero.stage=3", *TP2_DP2.overrides)
    found = run_ranks(4, flip_slices, config, [(NORM, 3), (SPLIT, 0)])
    # No other rank has a copy of a slice of a split matrix: nothing to compare it with.
    expected = [[], [f"{NORM} slice 1 differs between rank 2 and rank 3"], [], [], []]
    assert found == [expected] * 4


def test_bf16_copies_are_compared(tmp_path: Path) -> None:
    config = load(tmp_path, *NO_DROPOUT, "model.num_layers=2", "precision=bf16", *DP2.overrides)
    assert run_ranks(2, flip_bf16, config) == [[[], [f"{NORM} differs between rank 0 and rank 1"]]] * 2


def flip_bf16(config: RunConfig) -> list[list[str]]:
    engine, source = start_engine(config)
    step_once(engine, source)
    found = [[str(drift) for drift in engine.find_drift()]]
    if os.environ["RANK"] == "0":
        dict(engine.engine.module.named_parameters())[NORM].data.view(torch.int16)[0] ^= 1
    return [*found, [str(drift) for drift in engine.find_drift()]]


def test_one_process_has_no_copies(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert run_ranks(1, flip_each, config, [(NORM, 0)]) == [[[], [], []]]


def measure(config: RunConfig) -> tuple[float, float]:
    """CPU seconds of a step and of a check, each the shortest of three."""
    engine, source = start_engine(config)
    step_once(engine, source)
    seconds = []
    for work in (lambda: step_once(engine, source), engine.find_drift):
        starts = []
        for _ in range(3):
            start = time.process_time()
            work()
            starts.append(time.process_time() - start)
        seconds.append(min(starts))
    return seconds[0], seconds[1]


def test_a_check_costs_less_than_a_step(tmp_path: Path) -> None:
    """So that one in a hundred steps takes less than a hundredth of the time."""
    sizes = ("model.hidden_size=256", "model.ffn_hidden_size=1024")
    for step, check in run_ranks(2, measure, load(tmp_path, *sizes, "zero.stage=1")):
        print(f"check / step = {check:.4f} / {step:.4f} CPU seconds = {check / step:.3f}")
        assert check < step
