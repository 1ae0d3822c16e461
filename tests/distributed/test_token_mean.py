"""Masked tokens weigh the same in whatever micro-batch and rank they are: plain MLM on rows of uneven length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import run_ranks
from parity import STEPS, Figures, join_mesh, load, train_on

from pretrain.config.sections import RunConfig
from pretrain.data.batches import Batch
from pretrain.engine.token_mean import TokenMean
from pretrain.model.pretraining import PretrainingLosses
from pretrain.parallel.mesh import Mesh

UNEVEN = ("data.row_mode=document", "objective.mask_rate=0.3", "objective.contrastive_weight=0")
NO_DROPOUT = ("model.hidden_dropout=0", "model.attention_dropout=0")
LAYOUTS = {
    "one process": (1, [16, 4, 1], ()),
    "one process, ZeRO-0": (1, [4], ("zero.stage=0",)),
    "DP2": (2, [8, 2, 1], ()),
    "DP2, ZeRO-3": (2, [2], ("zero.stage=3",)),
    "TP2": (2, [4, 1], ("parallel.tensor=2",)),
    "PP2": (2, [4, 1], ("parallel.pipeline=2",)),
    "PP2 x DP2": (4, [4, 1], ("parallel.pipeline=2",)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import megatron.core.tensor_parallel  # noqa: F401  # before ranks fork

    return tmp_path_factory.mktemp("uneven")


def configure(folder: Path, micro_batch_size: int, *overrides: str) -> RunConfig:
    return load(folder, *UNEVEN, *NO_DROPOUT, f"train.micro_batch_size={micro_batch_size}", *overrides)


def figures_of(configs: Sequence[RunConfig]) -> list[Figures]:
    mesh = join_mesh(configs[0])
    return [train_on(mesh, config)[0][:STEPS] for config in configs]


@pytest.fixture(scope="module")
def whole(folder: Path) -> Figures:
    """The global batch in one piece: torch's own mean over its masked tokens."""
    return run_ranks(1, figures_of, [configure(folder, 16, "mlm.average=micro_batch")])[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_and_gradient_do_not_depend_on_micro_batch_and_layout(name: str, folder: Path, whole: Figures) -> None:
    num_ranks, sizes, overrides = LAYOUTS[name]
    configs = [configure(folder, size, *overrides) for size in sizes]
    for ranks in run_ranks(num_ranks, figures_of, configs, timeout=120):
        for figures in ranks:
            (loss, mlm, _, norm), (whole_loss, _, _, whole_norm) = figures[0], whole[0]
            assert loss == mlm == pytest.approx(whole_loss, rel=1e-6)
            assert norm == pytest.approx(whole_norm, rel=1e-6)
            for found, expected in zip(figures, whole, strict=True):
                assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_the_mean_of_micro_batches_is_another_one(folder: Path, whole: Figures) -> None:
    ((figures,),) = run_ranks(1, figures_of, [configure(folder, 1, "mlm.average=micro_batch")])
    assert figures[0] != pytest.approx(whole[0], rel=1e-2)


# -- the weights -------------------------------------------------------------------------------------------------------


def batch_of(num_labels: int) -> Batch:
    rows, places = np.zeros((2, 8), np.int64), np.full(6, -100)
    places[:num_labels] = 3
    return Batch(rows, rows, rows == 0, np.zeros(6, np.int64), places, 0)


def losses_of(mlm: torch.Tensor, rest: float, num_labels: int) -> PretrainingLosses:
    count = torch.tensor(num_labels)
    return PretrainingLosses(mlm + rest, mlm, torch.tensor(rest), count, count)


def test_weights_make_the_mean_of_micro_batches_the_mean_of_tokens() -> None:
    counts, sums = [5, 0, 1], [4.0, 0.0, 6.0]
    mean = TokenMean([batch_of(count) for count in counts], Mesh(0, 1), torch.device("cpu"))
    parts = [torch.tensor(s / max(n, 1), requires_grad=True) for s, n in zip(sums, counts, strict=True)]
    weighed = [mean.weigh(losses_of(part, 0.5, n)) for part, n in zip(parts, counts, strict=True)]
    assert sum(losses.mlm.item() for losses in weighed) / 3 == pytest.approx(10 / 6)
    total = sum(losses.total for losses in weighed) / 3
    assert total.item() == pytest.approx(10 / 6 + 0.5)
    total.backward()
    assert [float(part.grad) for part in parts] == pytest.approx([5 / 6, 0.0, 1 / 6])  # type: ignore[arg-type]


def test_equal_counts_change_no_bit() -> None:
    mean = TokenMean([batch_of(3), batch_of(3)], Mesh(0, 1), torch.device("cpu"))
    losses = losses_of(torch.tensor(7.123), 0.0, 3)
    assert mean.weigh(losses)[:2] == losses[:2]


@pytest.mark.fault("degenerate-batch")
def test_a_step_without_any_masked_token_has_no_mlm_loss() -> None:
    mean = TokenMean([batch_of(0), batch_of(0)], Mesh(0, 1), torch.device("cpu"))
    mlm = torch.tensor(0.0, requires_grad=True)
    losses = mean.weigh(losses_of(mlm, 0.25, 0))
    losses.total.backward()
    assert (losses.total.item(), losses.mlm.item(), float(mlm.grad)) == (0.25, 0.0, 0.0)  # type: ignore[arg-type]
