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
from parity import STEPS, TOLERANCE, Figures, build, deviation, load, plain_process

from pretrain import parallel
from pretrain.config_sections import RunConfig
from pretrain.engine import Engine, PlainEngine
from pretrain.errors import CheckpointError
from pretrain.optim import learning_rate
from pretrain.pipeline_engine import PipelinedEngine
from pretrain.state_files import MOMENTS, WEIGHT, StateReader

pytestmark = pytest.mark.slow  # importing megatron-core alone takes seconds

SAVED_AT = 3
LAYOUTS = {
    "one rank": (1, "zero.stage=0"),
    "DP2 ZeRO-0": (2, "zero.stage=0"),
    "DP2 ZeRO-1": (2, "zero.stage=1"),
    "DP2 ZeRO-2": (2, "zero.stage=2"),
    "DP4 ZeRO-3": (4, "zero.stage=3"),
    "DP2 ZeRO-2 round robin, offloaded": (
        2,
        "zero.stage=2",
        "zero.round_robin_gradients=true",
        "zero.offload_optimizer={device: cpu}",
    ),
    "TP2 ZeRO-0": (2, "parallel.tensor=2", "zero.stage=0"),
    "TP2 x DP2 ZeRO-1": (4, "parallel.tensor=2", "zero.stage=1"),
    "TP2 + SP ZeRO-2": (2, "parallel.tensor=2", "parallel.sequence=true", "zero.stage=2"),
    "TP2 x DP2 ZeRO-3": (4, "parallel.tensor=2", "zero.stage=3"),
    "TP4 ZeRO-1": (4, "parallel.tensor=4", "zero.stage=1"),
    "PP2": (2, "parallel.pipeline=2"),
    "PP4": (4, "parallel.pipeline=4"),
    "PP2 x DP2": (4, "parallel.pipeline=2"),
    "PP2 x TP2 + SP": (4, "parallel.pipeline=2", "parallel.tensor=2", "parallel.sequence=true"),
}
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


def start_engine(config: RunConfig) -> tuple[Engine, Any]:
    device = torch.device("cpu")
    parallel.start_process_group(parallel.read_launch(), device)
    mesh = parallel.start_mesh(config.parallel, device)
    model, source = build(config, mesh)
    return (PlainEngine if mesh.pp_size == 1 else PipelinedEngine)(config, model, device, mesh), source


def train(engine: Engine, source: Any, first: int, last: int) -> Figures:
    config, mesh = engine.config, engine.mesh
    per_step = config.train.global_batch_size // config.train.micro_batch_size
    figures: Figures = []
    for step in range(first, last):
        share = range(step * per_step + mesh.dp_rank, (step + 1) * per_step, mesh.dp_size)
        result = engine.train_step(
            [source.micro_batch(index) for index in share],
            learning_rate=learning_rate(step, config.optim, config.train.steps),
        )
        figures.append((result.loss, result.mlm_loss, result.contrastive_loss, result.grad_norm))
    return figures


def begin(config: RunConfig, target: Path) -> Figures:
    """One rank: train the first steps and save."""
    engine, source = start_engine(config)
    figures = train(engine, source, 0, SAVED_AT)
    engine.save_state(target)
    return figures


def go_on(config: RunConfig, origin: Path, again: Path) -> Figures:
    """One rank: load, save again as it is, train the other steps."""
    engine, source = start_engine(config)
    engine.load_state(origin)
    engine.save_state(again)
    return train(engine, source, SAVED_AT, STEPS)


def read_all(checkpoint: Path) -> dict[tuple[str, str], torch.Tensor]:
    with StateReader(checkpoint) as reader:
        return {(name, kind): reader.read_full(name, kind) for name in reader.shapes for kind in (WEIGHT, *MOMENTS)}


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
