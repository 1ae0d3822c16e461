"""The step benchmark: its peer computes the same loss, and its report holds the ratios."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pretrain.bench.contest import spread
from pretrain.bench.step import step
from pretrain.bench.step_contenders import CONTENDERS, VOCAB_SIZE, Shape, authors_loss, config_of, random_batch
from pretrain.bench.step_profile import show_profile, summarise
from pretrain.errors import ConfigError
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
        threads=1, steps=1, rounds=1, profile=tmp_path / "profile.txt", out=out, as_json=True, contender=None,
    )  # fmt: skip
    report = json.loads(out.read_text())
    assert "aten::" in (tmp_path / "profile.txt").read_text()
    assert all(found["lower"] <= found["median"] <= found["upper"] for found in report["spread"].values())
    assert set(report["seconds"]) == set(report["peak_bytes"]) == set(CONTENDERS)
    assert all(value > 0 for value in report["ratios"].values())


def event(name: str, device: str, start: float, end: float, own: float = 0.0, **more: object) -> SimpleNamespace:
    """One event as torch's profiler gives it; microseconds."""
    time_range = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(
        name=name, device_type=f"DeviceType.{device}", time_range=time_range, self_cpu_time_total=own, **more
    )


def test_a_profile_counts_kernels_once_and_overlapping_time_once() -> None:
    events = [
        event("aten::mm", "CPU", 0, 9, own=5),
        event("aten::mm", "CPU", 10, 19, own=6),
        event("cudaLaunchKernel", "CPU", 1, 2, own=1),
        event("cudaStreamSynchronize", "CPU", 30, 40, own=10),
        event("cudaDeviceSynchronize", "CPU", 40, 41, own=1),  # the profiler's own
        event("gemm", "CUDA", 100, 200),
        event("gemm", "CUDA", 150, 250),  # in another stream
        event("Memcpy DtoD", "CUDA", 300, 310),
        event("Optimizer.step#AdamW.step", "CUDA", 100, 310),
        event("a region that the program named", "CUDA", 0, 999, is_user_annotation=True),
    ]
    found = summarise(events, is_gpu=True)
    assert (found["operators"], found["kernel_count"], found["synchronisations"]) == (2, 3, 1)
    assert found["busy_seconds"] == pytest.approx(160e-6)
    assert found["kernels"] == [["gemm", 2, pytest.approx(200e-6)], ["Memcpy DtoD", 1, pytest.approx(10e-6)]]
    assert found["host"][0] == ["aten::mm", 2, pytest.approx(11e-6)]
    text = show_profile("taco", {"profile": found})
    assert "GPU busy 0.16 ms, 3 kernels, the host waited 1 times" in text
    assert "kernels" not in summarise(events[:3], is_gpu=False)


@pytest.mark.parametrize("row_mode", ["stream", "document", "sentence", "pack"])
def test_random_rows_have_the_shape_of_their_mode(row_mode: str) -> None:
    config = config_of(Shape(rows=8, seq_length=64, row_mode=row_mode), is_contrastive=True)
    batch = random_batch(config, 3, VOCAB_SIZE)
    segment_BL = batch.segment_BL
    assert (segment_BL.max() > 1) == (row_mode == "pack")
    assert (segment_BL.min() == 0) == (row_mode != "stream")
    # Padding only at the end, documents one after the other, each token that is predicted masked.
    assert all((np.diff(row[row > 0]) >= 0).all() and (row[np.count_nonzero(row) :] == 0).all() for row in segment_BL)
    used_M = batch.masked_label_M >= 0
    assert (segment_BL.ravel()[batch.masked_index_M[used_M]] > 0).all()
    assert (batch.input_ids_BL.ravel()[batch.masked_index_M[used_M]] == 103).all()
    assert len(set(batch.masked_index_M[used_M])) == used_M.sum()
    assert (batch.masked_index_M[~used_M] == 0).all()
    assert 0.1 < used_M.sum() / (segment_BL > 0).sum() < 0.2
    assert (batch.input_ids_BL == random_batch(config, 3, VOCAB_SIZE).input_ids_BL).all()


def test_a_wrong_setting_is_said_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=r"train\.kernel: unknown key; did you mean train\.kernels"):
        step(settings=["train.kernel=torch"])


def test_spread_of_values() -> None:
    assert spread([1.0]).as_dict() == {"median": 1.0, "lower": 1.0, "upper": 1.0}
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]).as_dict() == {"median": 3.0, "lower": 2.0, "upper": 4.0}
