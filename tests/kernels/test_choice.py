"""`train.kernels`: who computes what is not a matrix product."""

from __future__ import annotations

import pytest
import torch

from pretrain.errors import ConfigError
from pretrain.kernels.choice import choose_kernels

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_a_cpu_computes_with_torch_unless_told_otherwise() -> None:
    assert choose_kernels("auto", CPU) == "torch"
    assert choose_kernels("auto", GPU) == "triton"
    assert choose_kernels("torch", GPU) == "torch"


def test_triton_on_a_cpu_needs_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "interpret", True)
    assert choose_kernels("triton", CPU) == "triton"
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    with pytest.raises(ConfigError, match="train.kernels=triton: there is no GPU, .* set train.kernels=auto"):
        choose_kernels("triton", CPU)
