"""Dropout + residual + LayerNorm: C++ and Triton against the twin, the twin against autograd in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from pretrain.kernels.add_norm import add_norm, backward_twin, forward_twin
from pretrain.kernels.choice import Kernels
from pretrain.kernels.dropout_mask import HiddenDropout, drop_threshold, keep_mask, keep_scale
from pretrain.model.dropout import AFTER_FFN, DropoutKey

SHAPES = [(1, 8), (5, 12), (3, 64), (130, 260), (2, 768)]
# Relative to the largest element of what is compared.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
EPS = 1e-12


def _drop(device: torch.device, *, probability: float = 0.3, line_N: Tensor | None = None) -> HiddenDropout:
    words = DropoutKey.of(2**40 + 3, 2**33 + 9, 3, device).at(2)[AFTER_FFN]
    return HiddenDropout(probability, words, 11, line_N)


def _arguments(num_lines: int, width: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """hidden, residual, weight, bias, and a gradient of the output."""
    generator = torch.Generator().manual_seed(width)
    hidden, residual, grad = torch.randn(3, num_lines, width, generator=generator, dtype=torch.float64)
    weight = torch.rand(width, generator=generator, dtype=torch.float64) + 0.5
    bias = torch.randn(width, generator=generator, dtype=torch.float64) / 5
    return [tensor.to(dtype).to(device) for tensor in (hidden, residual + 0.5, weight, bias, grad)]


def _reference(arguments: list[Tensor], drop: HiddenDropout | None) -> list[Tensor]:
    """The output and the four gradients in float64, by torch's own functions."""
    hidden, residual, weight, bias, grad = (tensor.double() for tensor in arguments)
    leaves = [tensor.requires_grad_() for tensor in (hidden, residual, weight, bias)]
    kept = hidden
    if drop is not None:
        lines = torch.arange(11, 11 + len(hidden), device=hidden.device) if drop.line_N is None else drop.line_N
        keep = keep_mask(drop.words, lines, hidden.shape[1], drop.probability)
        kept = hidden * keep * keep_scale(drop_threshold(drop.probability))
    out = F.layer_norm(residual + kept, weight.shape, weight, bias, EPS)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _results(arguments: list[Tensor], drop: HiddenDropout | None, kernels: Kernels) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in arguments[:4]]
    out = add_norm(*leaves, eps=EPS, drop=drop, kernels=kernels)
    return [out.detach(), *torch.autograd.grad(out, leaves, arguments[4])]


def _check(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    names = ("output", "hidden", "residual", "weight", "bias")
    for name, one, other in zip(names, found, expected, strict=True):
        assert one.dtype == dtype, name
        scale = float(other.abs().max()) if other.numel() else 1.0
        assert_close(
            one.double(), other, rtol=0, atol=TOLERANCE[dtype] * max(scale, 1.0), msg=lambda t, n=name: f"{n}: {t}"
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("drops", ["nothing", "lines in order", "given lines"])
def test_fp32_equals_float64(shape: tuple[int, int], drops: str, device: torch.device) -> None:
    line_N = torch.arange(shape[0], device=device).flip(0) * 7 if drops == "given lines" else None
    drop = None if drops == "nothing" else _drop(device, line_N=line_N)
    arguments = _arguments(*shape, torch.float32, device)
    expected = _reference(arguments, drop)
    for kernels in ("torch", "triton"):
        _check(_results(arguments, drop, kernels), expected, torch.float32)
    out, rstd = forward_twin(*arguments[:4], EPS, drop)
    _check([out, *backward_twin(arguments[4], out, rstd, *arguments[2:4], drop)], expected, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_types_follow(dtype: torch.dtype, device: torch.device) -> None:
    arguments = _arguments(9, 200, dtype, device)
    expected = _reference(arguments, _drop(device))
    for kernels in ("torch", "triton"):
        _check(_results(arguments, _drop(device), kernels), expected, dtype)


def test_threads_change_no_bit() -> None:
    cpu = torch.device("cpu")
    arguments = _arguments(300, 400, torch.float32, cpu)
    one = _results(arguments, _drop(cpu), "torch")
    torch.set_num_threads(2)
    try:
        two = _results(arguments, _drop(cpu), "torch")
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(*pair) for pair in zip(one, two, strict=True))


def test_gradients_pass_gradcheck() -> None:
    arguments = [tensor.requires_grad_() for tensor in _arguments(4, 6, torch.float64, torch.device("cpu"))[:4]]
    drop = _drop(torch.device("cpu"))
    assert torch.autograd.gradcheck(lambda *leaves: add_norm(*leaves, eps=1e-5, drop=drop), arguments)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_constant_rows_zero_weights_and_no_rows_stay_finite(kernels: Kernels, device: torch.device) -> None:
    """1e-12 beside a variance of 0: the inverse is 1e6, and everything that it multiplies is 0."""
    hidden, residual, weight, bias, grad = _arguments(3, 16, torch.float32, device)
    hidden, residual, weight[3] = torch.zeros_like(hidden), torch.ones_like(residual), 0.0
    found = _results([hidden, residual, weight, bias, grad], _drop(device), kernels)
    assert torch.equal(found[0], bias.expand(3, -1))
    assert all(bool(tensor.isfinite().all()) for tensor in found)
    empty = _results([hidden[:0], residual[:0], weight, bias, grad[:0]], _drop(device), kernels)
    assert empty[0].shape == (0, 16)
    assert not empty[3].any()
    assert not empty[4].any()


def test_only_the_output_and_a_number_per_token_are_saved() -> None:
    arguments = _arguments(8, 32, torch.float32, torch.device("cpu"))
    leaves = [tensor.requires_grad_() for tensor in arguments[:4]]
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = add_norm(*leaves, eps=EPS, drop=_drop(torch.device("cpu")))
    of_tokens = [tensor for tensor in saved if tensor.is_floating_point() and len(tensor) == 8]
    assert sorted(tensor.numel() for tensor in of_tokens) == [8, 8 * 32]
    assert out.data_ptr() in [tensor.data_ptr() for tensor in of_tokens]
