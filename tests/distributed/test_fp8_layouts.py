"""`precision=fp8`, emulated on the CPU, through the real engine: as in bf16, in every kind of layout that it has."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import run_ranks
from parity import Outcome, load, train_all

from pretrain.config.sections import RunConfig

pytestmark = pytest.mark.slow

FP8 = ("precision=fp8", "fp8.emulate=true")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fp8")


def outcomes(configs: list[RunConfig], num_ranks: int) -> list[list[Outcome]]:
    by_rank: list[list[Outcome]] = run_ranks(num_ranks, train_all, configs, timeout=280)
    return by_rank


@pytest.fixture(scope="module")
def in_bf16(folder: Path) -> Outcome:
    return outcomes([load(folder, "precision=bf16")], 1)[0][0]


@pytest.mark.parametrize(
    ("num_ranks", "layouts"),
    [
        (1, [(), ("train.recompute_layers=all",), ("zero.stage=3", "zero.stage3_param_persistence_threshold=0")]),
        (2, [("zero.stage=2",), ("zero.stage=3", "zero.stage3_param_persistence_threshold=0")]),
        (2, [("parallel.pipeline=2",)]),
    ],
)
def test_losses_are_those_of_bf16_within_the_rounding(
    num_ranks: int, layouts: list[tuple[str, ...]], folder: Path, in_bf16: Outcome
) -> None:
    """Five steps: total and MLM loss within 2 %, the contrastive loss and the gradient norm within 20 %."""
    by_rank = outcomes([load(folder, *FP8, *layout) for layout in layouts], num_ranks)
    for outcome in (outcome for rank in by_rank for outcome in rank):
        for found, expected in zip(outcome.figures[:-1], in_bf16.figures[:-1], strict=True):
            assert found[:2] == pytest.approx(expected[:2], rel=0.02)
            assert found[2:] == pytest.approx(expected[2:], rel=0.2)
        assert outcome.figures[0][3] != in_bf16.figures[0][3]  # FP8 did take part
