"""Rows that leave nothing to learn: every loss is a number, and the weights stay numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import run_ranks
from small_runs import write_cyclic_dataset, write_small_run

from pretrain.checkpoint.manifest import find_checkpoint
from pretrain.checkpoint.weights import read_weights
from pretrain.data.dataset.dataset_writer import IndexedDatasetWriter
from pretrain.data.tokenizer.load import load_tokenizer
from pretrain.metrics import read_metrics
from pretrain.train import train

# Settings, and the value that a loss must have in every step, where it must have one.
CASES: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "one token per row": ({"data__row_mode": "document"}, {}),
    "no masked token": ({"objective__mask_rate": 1e-9}, {}),
    "more negatives than tokens": ({"objective__num_negatives": 3000}, {}),
    "one token per row, so no pair": (
        {"data__row_mode": "document", "objective__exclude_special": True},
        {"contrastive_loss": 0.0},
    ),
}


def train_on(config: Path) -> None:
    train(config=config, overrides=[], dry_run=False, allow_change=None)


def write_single_tokens(prefix: Path) -> None:
    """Documents of one token each."""
    write_cyclic_dataset(prefix)
    tokenizer = load_tokenizer(Path(f"{prefix}.tokenizer"))
    with IndexedDatasetWriter(prefix, "uint16", overwrite=True) as writer:
        for number in range(200):
            writer.add_document([np.array([5 + number % 50], np.uint16)])
        writer.finalize(tokenizer=tokenizer.info, command=["test"])


@pytest.mark.fault("degenerate-batch")
@pytest.mark.parametrize("case", CASES)
def test_every_loss_is_a_number(case: str, tmp_path: Path) -> None:
    settings, expected = CASES[case]
    write_single_tokens(tmp_path / "train")
    write_single_tokens(tmp_path / "validation")
    config = write_small_run(tmp_path, **settings, train__steps=3, optim__warmup_steps=1, checkpoint={"every_steps": 3})
    run_ranks(1, train_on, config)
    records = [record for record in read_metrics(tmp_path / "run") if "loss" in record]
    assert len(records) == 3
    for record in records:
        losses = [record[name] for name in ("loss", "mlm_loss", "contrastive_loss", "grad_norm")]
        assert all(value is not None and math.isfinite(value) for value in losses), record
        assert {name: record[name] for name in expected} == expected
    assert records[-1]["skipped_steps"] == 0
    assert all(tensor.isfinite().all() for tensor in read_weights(find_checkpoint(tmp_path / "run")).values())
