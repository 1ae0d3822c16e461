"""The benchmark of the contrastive loss: its contenders compute the same, and its report holds the figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pretrain.bench.loss import loss, summarise, table
from pretrain.bench.loss_contenders import chunked, make_inputs, measure
from pretrain.errors import ConfigError
from pretrain.objectives.taco import token_contrastive_loss

SHAPE = {"rows": 3, "seq_length": 8, "hidden_size": 6, "num_negatives": 5, "device": "cpu", "precision": "fp32"}


def test_gathering_by_chunks_gives_the_same_loss_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.bench.loss_contenders._CHUNK_BYTES", 1000)  # six anchors, and a rest
    inputs = make_inputs(SHAPE, torch.device("cpu"))
    expected = token_contrastive_loss(*inputs, temperature=0.07)
    gradients = torch.autograd.grad(expected, inputs[:2])
    torch.testing.assert_close(chunked(inputs), (expected.detach(), *gradients))


def test_report_of_what_contenders_answer() -> None:
    threads = torch.get_num_threads()
    runs = {name: [measure(name, SHAPE, threads, 2)] for name in ("taco", "chunked", "authors")}
    report = summarise(SHAPE, threads, runs)
    assert report["loss"]["taco"] == pytest.approx(report["loss"]["authors"], rel=1e-6)
    assert set(report["ratios"]) == {"time_taco_over_chunked", "time_taco_over_authors"}
    assert len(table(report).splitlines()) == 1 + 3 + 2


def test_contenders_that_are_not_there_are_named() -> None:
    with pytest.raises(ConfigError, match="--only nobody: .* choose from taco, triton, chunked, authors"):
        loss(only=["nobody"], device="cpu", interpreter=False, contender=None)
    with pytest.raises(ConfigError, match="add --interpreter"):
        loss(only=["triton"], device="cpu", interpreter=False, contender=None)


@pytest.mark.slow
def test_triton_runs_in_its_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    out = tmp_path / "loss.json"
    loss(
        rows=2, seq_length=4, hidden_size=8, num_negatives=3, threads=1, repeats=1, rounds=1, device="cpu",
        precision="fp32", interpreter=True, only=["taco", "triton"], out=out, as_json=True, contender=None,
    )  # fmt: skip
    report = json.loads(out.read_text())
    assert report["loss"]["triton"] == pytest.approx(report["loss"]["taco"], rel=1e-6)
    assert report["ratios"]["time_triton_over_taco"] > 0
