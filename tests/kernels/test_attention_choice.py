"""`train.attention`: who computes attention, and the reason where it cannot be what was asked for."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pretrain.errors import ConfigError
from pretrain.kernels import attention_choice
from pretrain.kernels.attention_choice import AttentionNeeds, choose_attention
from pretrain.kernels.attention_dropout import AttentionDropout
from pretrain.model.attention import self_attention
from pretrain.model.token_rows import plan_rows

CPU, GPU = torch.device("cpu"), torch.device("cuda")
USUAL = AttentionNeeds(GPU, "bf16", 0.1, 64, True)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The packages that are there."""
    names = {"torch.nn.attention.varlen"}
    monkeypatch.setattr(attention_choice, "_exists", names.__contains__)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # no question to a GPU that may be too old
    return names


def test_auto_takes_what_can_do_what_the_run_needs(installed: set[str]) -> None:
    def chosen(kernels: Any = "triton", **changes: Any) -> str:
        return choose_attention("auto", kernels, USUAL._replace(**changes))

    assert chosen() == "triton"
    assert chosen(dropout=0.0) == "varlen"
    assert chosen(dropout=0.0, precision="fp32") == "triton"
    assert chosen(has_documents=False) == "torch"
    assert chosen(device=CPU) == "torch"
    assert chosen(kernels="torch") == "torch"
    installed.add("flash_attn")
    assert chosen(kernels="torch") == chosen(head_size=160) == "flash_attn"
    assert chosen(head_size=320) == chosen(kernels="torch", precision="fp32") == "torch"


@pytest.mark.parametrize(
    ("wanted", "changes", "words"),
    [
        ("varlen", {}, "varlen: it has no dropout, and model.attention_dropout is 0.1; set train.attention=auto"),
        ("varlen", {"precision": "fp32"}, "16 bits, and precision is fp32"),
        ("varlen", {"device": CPU}, "there is no GPU"),
        ("varlen", {"head_size": 20}, "multiple of 8 features, and these have 20"),
        ("flash_attn", {}, "flash-attn is not installed"),
        ("triton", {"head_size": 160}, r"at most 128 features, and these have 160 \(model.hidden_size"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(
    wanted: Any, changes: dict[str, Any], words: str, installed: set[str]
) -> None:
    with pytest.raises(ConfigError, match=words):
        choose_attention(wanted, "triton", USUAL._replace(**changes))


def test_an_old_torch_or_gpu_is_refused(installed: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    installed.clear()
    with pytest.raises(ConfigError, match="torch .* does not have it"):
        choose_attention("varlen", "triton", USUAL._replace(dropout=0.0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    with pytest.raises(ConfigError, match="Ampere GPU or a later one, and this is Tesla T4"):
        choose_attention("flash_attn", "triton", USUAL)


def test_packages_get_the_documents_and_the_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for their kernels, which run on a GPU only."""
    rows = plan_rows(np.array([[1, 1, 2], [1, 0, 0]]), separate_documents=True)
    calls: list[dict[str, Any]] = []

    def stand_in(
        query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, same: Tensor, longest: int, equal: int, **more: Any
    ) -> Tensor:
        calls.append(more)
        assert same is bounds
        assert bounds.dtype == torch.int32
        assert longest == equal == 3
        parts = [slice(*pair) for pair in zip(bounds.tolist(), bounds.tolist()[1:], strict=False)]
        outputs = [
            torch.nn.functional.scaled_dot_product_attention(*(x[part].transpose(0, 1) for x in (query, key, value)))
            for part in parts
        ]
        return torch.cat([output.transpose(0, 1) for output in outputs])

    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func = stand_in  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    qkv = torch.randn(rows.num_tokens, 2 * 3 * 8)
    expected = self_attention(qkv, rows, 8)
    drop = AttentionDropout(0.25, None, 0, 2, 3)
    assert_close(self_attention(qkv, rows, 8, None, "varlen"), expected)
    assert_close(self_attention(qkv, rows, 8, drop, "flash_attn"), expected)
    assert_close(self_attention(qkv, rows, 8, None, "flash_attn"), expected)
    assert [call.get("dropout_p") for call in calls] == [None, 0.25, 0.0]
