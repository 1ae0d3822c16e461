"""ZeRO 0-3 on one and two ranks against one plain PyTorch process: losses, gradient norms and final weights.

The reference is that of `parity.py`. Clipping is active and dropout is on, so scaling, averaging, clipping and dropout
seeds must all be right for the figures to agree; the final weights are read back from what the engine saves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import engine_rank
from forked import run_ranks
from parity import STEPS, Figures, deviation, load, plain_process

from pretrain.config.deepspeed import zero_stage

LOSS_TOLERANCE = 1e-6
WEIGHT_TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def adamw_reference(folder: Path) -> tuple[Figures, dict[str, torch.Tensor]]:
    return run_ranks(1, plain_process, load(folder))[0]


@pytest.fixture(scope="module")
def lamb_reference(folder: Path) -> tuple[Figures, dict[str, torch.Tensor]]:
    return run_ranks(1, plain_process, load(folder, "optim.name=lamb"))[0]


def check(results: list[Any], reference: tuple[Figures, dict[str, torch.Tensor]]) -> None:
    expected, weights = reference
    for figures, _ in results:
        assert deviation(figures, expected) < LOSS_TOLERANCE
    found = results[0][1]
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.allclose(found[name], weight, rtol=0, atol=WEIGHT_TOLERANCE), name


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_stages_equal_one_plain_process(
    stage: int, world_size: int, folder: Path, tmp_path: Path, adamw_reference: Any
) -> None:
    check(run_ranks(world_size, engine_rank, load(folder, f"zero.stage={stage}"), tmp_path), adamw_reference)


def test_clipping_is_active_in_these_tests(adamw_reference: Any, folder: Path) -> None:
    assert all(norm > load(folder).optim.clip_grad_norm for *_, norm in adamw_reference[0][:STEPS])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_lamb_stays_exact_when_zero_splits_it(stage: int, folder: Path, tmp_path: Path, lamb_reference: Any) -> None:
    config = load(folder, "optim.name=lamb", f"zero.stage={stage}")
    check(run_ranks(2, engine_rank, config, tmp_path), lamb_reference)


def test_without_the_contrastive_loss(folder: Path, tmp_path: Path) -> None:
    config = load(folder, "objective.contrastive_weight=0")
    check(run_ranks(2, engine_rank, config, tmp_path), run_ranks(1, plain_process, config)[0])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_follows_fp32(stage: int, folder: Path, tmp_path: Path, adamw_reference: Any) -> None:
    config = load(folder, "precision=bf16", f"zero.stage={stage}")
    figures, weights = run_ranks(2, engine_rank, config, tmp_path)[0]
    # bf16 keeps 8 bits of a number: losses agree to a percent, and the fp32 master weights keep small updates.
    assert deviation([f[:3] for f in figures], [f[:3] for f in adamw_reference[0]]) < 0.03  # type: ignore[misc,arg-type]
    assert all(weight.dtype == torch.float32 for weight in weights.values())


def test_bf16_never_runs_without_master_weights(folder: Path) -> None:
    assert zero_stage(load(folder, "precision=bf16", "zero.stage=0")) == 1
