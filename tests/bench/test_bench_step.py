"""The step benchmark: its peer computes the same loss, and its report holds the ratios."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pretrain.bench.step import step
from pretrain.bench.step_contenders import CONTENDERS, authors_loss
from pretrain.objectives.taco import sample_pairs, token_contrastive_loss


def test_the_peers_loss_is_ours_in_value_and_gradient() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 8, 6, dtype=torch.float64, requires_grad=True)
    embedding = torch.randn(3, 8, 6, dtype=torch.float64, requires_grad=True)
    valid = torch.ones(3, 8, dtype=torch.bool)
    pairs = sample_pairs(valid, window=2, num_negatives=5, seed=1, micro_batch_index=0)
    theirs = authors_loss(hidden, embedding, *pairs, 0.07)
    ours = token_contrastive_loss(hidden, embedding, *pairs, temperature=0.07)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    for one, other in zip(
        torch.autograd.grad(ours, (hidden, embedding)), torch.autograd.grad(theirs, (hidden, embedding)), strict=True
    ):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-14)


@pytest.mark.slow
def test_report_holds_figures_of_every_contender(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    step(
        rows=2, seq_length=16, num_layers=1, hidden_size=64, num_negatives=4, dropout=0.1,
        threads=1, steps=1, rounds=1, out=out, as_json=True, contender=None,
    )  # fmt: skip
    report = json.loads(out.read_text())
    assert set(report["seconds"]) == set(report["peak_bytes"]) == set(CONTENDERS)
    assert all(value > 0 for value in report["ratios"].values())
