"""Attention by document in Triton against the twin for a CPU in fp64, output and gradient, with its dropout."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from project import ROOT
from torch import Tensor
from torch.testing import assert_close

from pretrain.config.sections import ModelSection
from pretrain.kernels.attention import triton_attention
from pretrain.kernels.attention_dropout import AttentionDropout
from pretrain.model.attention_cpu import attention_cpu
from pretrain.model.bert import Bert
from pretrain.model.dropout import ATTENTION_WEIGHTS, DropoutKey
from pretrain.model.layer_spec import plain_layers
from pretrain.model.token_rows import TokenRows, full_rows, plan_rows

LENGTH = 90


def _rows(*documents: list[int]) -> TokenRows:
    """Packed rows of documents with these lengths."""
    segment_BL = np.zeros((len(documents), LENGTH), np.int64)
    for row, lengths in enumerate(documents):
        numbers = np.repeat(np.arange(len(lengths)) + 1, lengths)
        segment_BL[row, : len(numbers)] = numbers
    return plan_rows(segment_BL, separate_documents=True)


def _drop(probability: float, num_heads_here: int, device: torch.device) -> AttentionDropout | None:
    words = DropoutKey.of(2**40 + 3, 2**33 + 7, 4, device).at(3)[ATTENTION_WEIGHTS]
    return AttentionDropout(probability, words, 3, 3 + num_heads_here, LENGTH) if probability else None


def _check(rows: TokenRows, size: int, dtype: torch.dtype, probability: float, device: torch.device) -> None:
    num_heads = 2 if size < 32 else 1
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(rows.num_tokens, num_heads * 3 * size, generator=generator).to(dtype)
    slope = torch.randn(rows.num_tokens, num_heads * size, generator=generator).to(dtype)
    here, there = qkv.to(device).requires_grad_(), qkv.double().requires_grad_()
    on_device = rows.to(device)
    assert on_device.block_K3 is not None
    drop = _drop(probability, num_heads, device)
    output = triton_attention(here, size, on_device.block_K3, on_device.place_T, drop)
    expected = attention_cpu(there, rows, size, _drop(probability, num_heads, torch.device("cpu")))
    assert output.dtype == dtype
    (gradient,) = torch.autograd.grad(output, here, slope.to(device))
    (wanted,) = torch.autograd.grad(expected, there, slope.double())
    # In 16 bits the weights are rounded before their product with the values.
    tolerance: dict[str, Any] = {
        torch.float32: {"rtol": 1e-5, "atol": 3e-6},
        torch.float16: {"rtol": 0.01, "atol": 0.005},
        torch.bfloat16: {"rtol": 0.03, "atol": 0.03},
    }[dtype]
    assert_close(output.cpu().double(), expected.detach(), **tolerance)
    assert_close(gradient.cpu().double(), wanted, **tolerance)


@pytest.mark.parametrize(
    ("size", "dtype", "probability"),
    [
        (16, torch.float32, 0.0),
        (24, torch.float32, 0.3),
        (64, torch.bfloat16, 0.1),
        pytest.param(128, torch.float16, 0.2, marks=pytest.mark.slow),
    ],
)
def test_documents_equal_the_twin(size: int, dtype: torch.dtype, probability: float, device: torch.device) -> None:
    _check(_rows([66, 1, 3], [], [20]), size, dtype, probability, device)


@pytest.mark.parametrize("rows", [_rows([1]), _rows([]), full_rows(2, LENGTH), _rows([1] * 12)])
@pytest.mark.slow
def test_rows_of_every_kind(rows: TokenRows, device: torch.device) -> None:
    """One token; nothing but padding; whole rows; many documents."""
    _check(rows, 16, torch.float32, 0.3, device)


_COMPILED = """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from pretrain.kernels import attention

    def compile_for_a_gpu(kernel, dtype, **constants):
        kinds = {"blocks": "*i32", "place": "*i64", "words": "*i64", "log_sum": "*fp32", "inner": "*fp32"}
        kinds |= dict.fromkeys(("qkv", "out", "grad_out", "grad_qkv"), f"*{dtype}")
        kinds |= dict.fromkeys(("keep_scale", "scale", "scale_log2e"), "fp32") | dict.fromkeys(constants, "constexpr")
        signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
        source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): constants[name] for name in constants})
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 2})

    common = dict(heads_here=2, size=64, padded_size=64, is_dropped=True, has_places=True, precision="tf32")
    compile_for_a_gpu(attention._forward_kernel, "bf16", queries=64, keys=64, **common)
    compile_for_a_gpu(attention._backward_kernel, "bf16", block=64, step=64, **common)
"""


@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    """The interpreter accepts more than the compiler does."""
    own = {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(_COMPILED)]
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_model_follows_the_twin(device: torch.device) -> None:
    """The choice reaches the layers."""
    config = ModelSection(num_layers=1, hidden_size=16, num_attention_heads=1, ffn_hidden_size=16)
    segment_BL = torch.tensor([[1, 1, 2, 2, 2, 0], [1, 0, 0, 0, 0, 0]], device=device)
    found: list[Tensor] = []
    for attention in ("torch", "triton"):
        layers = replace(plain_layers(), attention=attention)  # type: ignore[arg-type]
        model = Bert(config, 9, layers, separate_documents=True).to(device)
        key = DropoutKey.of(1, 2, 1, device)
        found.append(model.encode(segment_BL, segment_BL, key=key)[0])
    if device.type == "cpu":  # torch drops other weights on a GPU
        assert_close(*found, rtol=0, atol=1e-5)
