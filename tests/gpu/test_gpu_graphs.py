"""CUDA graphs of the encoder against eager passes, to the last bit, where kernels repeat to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from layouts import DROPOUT, Case, Grid
from parity import Outcome, layout_outcomes

DETERMINISTIC = ("run.device=cuda", "train.deterministic=true")
ONE_MICRO_BATCH = ("train.micro_batch_size=4", "train.global_batch_size=4")
SETTINGS = {
    "fp32, ZeRO-0": ("zero.stage=0",),
    "fp32, ZeRO-0, one micro-batch": ("zero.stage=0", *ONE_MICRO_BATCH),
    "fp32, ZeRO-1": ("zero.stage=1",),
    "bf16, ZeRO-1": ("zero.stage=1", "precision=bf16"),
    "bf16, ZeRO-1, one micro-batch": ("zero.stage=1", "precision=bf16", *ONE_MICRO_BATCH),
    "bf16, ZeRO-2": ("zero.stage=2", "precision=bf16"),
    "bf16, ZeRO-1, compiled": ("zero.stage=1", "precision=bf16", "train.compile=layers"),
    "fp32, ZeRO-1, recomputing": ("zero.stage=1", "train.recompute_layers=all", "model.attention_dropout=0"),
    "fp16, ZeRO-1": ("zero.stage=1", "precision=fp16", "fp16.initial_scale_power=10"),
}


def outcome(folder: Path, *overrides: str) -> Outcome:
    """In a process of its own, as a run is."""
    return layout_outcomes(folder, [Case(Grid(), setting=DROPOUT)], (*DETERMINISTIC, *overrides))[0][0]


@pytest.mark.parametrize("name", SETTINGS)
def test_replayed_steps_have_the_bits_of_eager_ones(name: str, tmp_path: Path) -> None:
    """Losses, gradient norm, evaluation and weights of five steps, with dropout."""
    eager = outcome(tmp_path, *SETTINGS[name])
    replayed = outcome(tmp_path, *SETTINGS[name], "train.cuda_graphs=true")
    assert replayed.pairs == eager.pairs
    assert replayed.figures == eager.figures
    assert all(torch.equal(replayed.weights[key], weight) for key, weight in eager.weights.items())
    # The layers ran for warming up and recording only, and in the evaluation.
    assert replayed.num_attentions != eager.num_attentions
