"""Validation: every row counts once, whatever the micro-batch and the number of ranks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from forked import run_ranks
from parity import join_mesh, load

from pretrain.config.sections import RunConfig
from pretrain.data.batches import Batch, BatchSource, RowSource, open_batches, open_source
from pretrain.engine.engine import EvalResult
from pretrain.engine.plain import PlainEngine
from pretrain.model.build import build_model
from pretrain.parallel.mesh import Mesh
from pretrain.trainer import Trainer

NUM_BATCHES = 100  # more than there are


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("validation")


def configure(folder: Path, size: int, num_batches: int = NUM_BATCHES, weight: float = 0.0) -> RunConfig:
    overrides = [f"train.micro_batch_size={size}", f"train.global_batch_size={12 * size}"]
    overrides += [f"train.eval_batches={num_batches}", f"objective.contrastive_weight={weight}"]
    return load(folder, "data.row_mode=document", *overrides)


def source_of(config: RunConfig) -> BatchSource:
    return open_batches(config, open_source(config, "validation"), seed=0)


def batches_of(config: RunConfig, source: BatchSource, rank: int, num_ranks: int) -> list[Batch]:
    engine = SimpleNamespace(mesh=Mesh(rank, num_ranks))
    trainer = SimpleNamespace(validation_source=source, config=config, engine=engine)
    return list(Trainer._validation_batches(cast(Trainer, trainer)))


def counted(batch: Batch) -> list[tuple[bytes, bytes]]:
    """Words and labels of the rows that count."""
    label_BP = batch.masked_label_M.reshape(len(batch.valid_BL), -1)
    is_counted_B = batch.valid_BL.any(axis=1)
    assert batch.num_rows == is_counted_B.sum()
    assert (label_BP[~is_counted_B] == -100).all()
    return [
        (batch.input_ids_BL[row].tobytes(), label_BP[row].tobytes()) for row in np.flatnonzero(is_counted_B).tolist()
    ]


@pytest.mark.parametrize("size", [1, 4, 5, 64])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_row_counts_once(size: int, num_ranks: int, folder: Path) -> None:
    config = configure(folder, size)
    source = source_of(config)
    single = source_of(configure(folder, 1))
    expected = [row for index in range(source.rows.num_rows) for row in counted(single.micro_batch(index))]
    shares = [batches_of(config, source, rank, num_ranks) for rank in range(num_ranks)]
    assert len({len(share) for share in shares}) == 1
    found = [row for share in shares for batch in share for row in counted(batch)]
    assert sorted(found) == sorted(expected)
    assert sum(batch.num_labels for share in shares for batch in share) == sum(
        single.micro_batch(index).num_labels for index in range(source.rows.num_rows)
    )


def test_no_more_batches_than_asked_for(folder: Path) -> None:
    config = configure(folder, 2, num_batches=3)
    source = source_of(config)
    assert [batch.micro_batch_index for batch in batches_of(config, source, 0, 1)] == [0, 1, 2]
    assert [batch.micro_batch_index for batch in batches_of(config, source, 1, 2)] == [1, 0]
    assert batches_of(config, source, 1, 2)[1].num_rows == 0


def results_of(configs: list[RunConfig]) -> list[EvalResult]:
    mesh = join_mesh(configs[0])
    return [_evaluate(config, mesh) for config in configs]


def _evaluate(config: RunConfig, mesh: Mesh) -> EvalResult:
    rows: RowSource = open_source(config, "validation")
    model: Any = build_model(config, rows.tokenizer.vocab_size, mesh)
    engine = PlainEngine(config, model, torch.device("cpu"), mesh)
    return engine.evaluate(batches_of(config, source_of(config), mesh.dp_rank, mesh.dp_size))


@pytest.mark.slow
def test_figures_do_not_depend_on_micro_batch_and_ranks(folder: Path) -> None:
    configs = [configure(folder, size) for size in (64, 4, 5, 1)]
    (whole, *others), pairs = run_ranks(1, results_of, configs)[0], run_ranks(2, results_of, configs[1:])
    for result in (*others, *pairs[0], *pairs[1]):
        assert result.mlm_loss == pytest.approx(whole.mlm_loss, rel=1e-6)
        assert (result.accuracy, result.num_labels) == (whole.accuracy, whole.num_labels)
        assert result.baseline_accuracy == whole.baseline_accuracy


@pytest.mark.slow
def test_a_row_without_negatives_does_not_lower_the_contrastive_loss(folder: Path) -> None:
    num_rows = open_source(configure(folder, 1), "validation").num_rows
    size = num_rows - 1  # the second micro-batch has one row that counts
    configs = [configure(folder, size, num_batches, weight=1.0) for num_batches in (1, 2)]
    first, both = run_ranks(1, results_of, configs)[0]
    assert both.contrastive_loss == pytest.approx(first.contrastive_loss)
    assert both.num_labels > first.num_labels
