"""A run saved in one layout and continued in another: the state to the bit, and the figures of one plain process.

Every layout is saved once, and continued in several others. After loading, the new layout saves at once: all weights
and moments must be those that were saved. Then it trains on, and every figure must be that of a plain process which was
never interrupted. Dropout is off, because tensor-parallel ranks drop attention weights by other seeds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_ranks
from layouts import SETTING
from moves import LAYOUTS, SAVED_AT, begin, go_on, read_all, start_engine
from parity import STEPS, TOLERANCE, Figures, deviation, load, plain_process

from pretrain.config.sections import RunConfig
from pretrain.errors import CheckpointError

pytestmark = pytest.mark.slow  # importing megatron-core alone takes seconds

# From each layout to the next one and to the fifth after it: every layout is left twice and reached twice.
NAMES = list(LAYOUTS)
MOVES = [(name, NAMES[(index + step) % len(NAMES)]) for index, name in enumerate(NAMES) for step in (1, 5)]


@pytest.fixture(scope="module", autouse=True)
def _import_megatron_once() -> None:
    import megatron.core.tensor_parallel  # noqa: F401  # before the ranks fork


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("moves")


@pytest.fixture(scope="module")
def reference(folder: Path) -> tuple[Figures, dict[str, torch.Tensor]]:
    return run_ranks(1, plain_process, load(folder, *SETTING))[0]


@pytest.fixture(scope="module")
def saved(folder: Path) -> dict[str, Path]:
    """Where each layout that was asked for has been saved."""
    return {}


def save_once(name: str, folder: Path, saved: dict[str, Path], reference: Any, *overrides: str) -> Path:
    if name not in saved:
        world_size, *layout = LAYOUTS[name]
        target = folder / name
        target.mkdir()
        for figures in run_ranks(world_size, begin, load(folder, *SETTING, *layout, *overrides), target):
            assert deviation(figures, reference[0][:SAVED_AT]) < TOLERANCE
        saved[name] = target
    return saved[name]


@pytest.mark.fault("other-layout")
@pytest.mark.parametrize(("source", "target"), MOVES)
def test_a_run_moves(
    source: str, target: str, folder: Path, saved: dict[str, Path], reference: Any, tmp_path: Path
) -> None:
    origin = save_once(source, folder, saved, reference)
    world_size, *layout = LAYOUTS[target]
    found = run_ranks(world_size, go_on, load(folder, *SETTING, *layout), origin, tmp_path)
    for figures in found:
        assert deviation(figures, reference[0][SAVED_AT:STEPS]) < TOLERANCE
    before, after = read_all(origin), read_all(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.equal(values, after[key]) for key, values in before.items())
    assert {name for name, _ in before} == reference[1].keys()
    assert (origin / "state" / "counters.json").read_bytes() == (tmp_path / "state" / "counters.json").read_bytes()


@pytest.mark.fault("other-layout")
def test_lamb_moves_too(folder: Path, tmp_path: Path) -> None:
    config = load(folder, *SETTING, "optim.name=lamb")
    reference = run_ranks(1, plain_process, config)[0][0]
    for name in ("saved", "again"):
        (tmp_path / name).mkdir()
    run_ranks(2, begin, load(folder, *SETTING, "optim.name=lamb", "zero.stage=3"), tmp_path / "saved")
    target = load(folder, *SETTING, "optim.name=lamb", "parallel.tensor=2", "zero.stage=1")
    for figures in run_ranks(4, go_on, target, tmp_path / "saved", tmp_path / "again"):
        assert deviation(figures, reference[SAVED_AT:STEPS]) < TOLERANCE


@pytest.mark.fault("other-layout")
def test_bf16_moves_to_fp32_and_back(folder: Path, tmp_path: Path, saved: dict[str, Path], reference: Any) -> None:
    """The files hold the fp32 weights in every precision, so these moves lose nothing."""
    for name in ("bf16", "fp32"):
        (tmp_path / name).mkdir()
    origin = save_once("DP2 ZeRO-1", folder, saved, reference)
    for overrides in (("precision=bf16", "zero.stage=3"), ("precision=bf16", "parallel.pipeline=2")):
        run_ranks(2, go_on, load(folder, *SETTING, *overrides), origin, tmp_path / "bf16")
        again = load(folder, *SETTING, "parallel.tensor=2")
        for figures in run_ranks(2, go_on, again, tmp_path / "bf16", tmp_path / "fp32"):
            assert deviation(figures, reference[0][SAVED_AT:STEPS]) < TOLERANCE


def refuse(config: RunConfig, origin: Path) -> str:
    engine, _ = start_engine(config)
    with pytest.raises(CheckpointError) as caught:
        engine.load_state(origin)
    return str(caught.value)


@pytest.mark.fault("other-layout")
def test_another_model_is_refused_on_all_ranks(
    folder: Path, tmp_path: Path, saved: dict[str, Path], reference: Any
) -> None:
    origin = save_once("PP2", folder, saved, reference)
    config = load(folder, *SETTING, "model.ffn_hidden_size=32")
    found = run_ranks(2, refuse, config, origin)
    assert found[0] == found[1]
    assert "2.ffn_in.weight is (64, 32), the model of this run has (32, 32)" in found[0]
