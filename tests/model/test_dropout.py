"""The CPU's own dropout and dropout attention: rate, mean, and equality with the plain formula by autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pretrain.model.attention import attention_mask, self_attention
from pretrain.model.dropout import DropoutKey, draw_keep, dropout, seed_dropout


def test_places_and_micro_batches_drop_differently_and_always_the_same() -> None:
    def drawn(seed: int, micro_batch_index: int, place: str) -> Tensor:
        seed_dropout(DropoutKey(seed, micro_batch_index), place, torch.device("cpu"))
        return torch.rand(8)

    first = drawn(1, 7, "2")
    assert not torch.equal(first, drawn(1, 8, "2"))
    assert not torch.equal(first, drawn(2, 7, "2"))
    assert not torch.equal(first, drawn(1, 7, "3"))
    assert torch.equal(first, drawn(1, 7, "2"))


@pytest.mark.parametrize("probability", [0.001, 0.1, 0.5, 0.9])
def test_rate_and_mean(probability: float) -> None:
    torch.manual_seed(0)
    keep, scale = draw_keep((1000, 1001), probability)
    deviation = (probability * (1 - probability) / keep.numel()) ** 0.5
    assert abs(float((~keep).double().mean()) - probability) < 5 * deviation + 2**-17
    assert scale == pytest.approx(1 / (1 - probability), rel=2e-4)


def test_neighbours_are_independent() -> None:
    torch.manual_seed(0)
    keep, _ = draw_keep((400_000,), 0.5)
    for distance in (1, 2, 3, 4):
        assert abs(float((keep[distance:] == keep[:-distance]).double().mean()) - 0.5) < 0.005


def test_dropout_zeroes_scales_and_passes_the_gradient_of_what_stays() -> None:
    hidden = torch.rand(50, 7, requires_grad=True) + 1
    hidden.retain_grad()
    torch.manual_seed(3)
    dropped = dropout(hidden, 0.25, True)
    dropped.sum().backward()
    is_kept = dropped != 0
    assert 0 < int(is_kept.sum()) < is_kept.numel()
    assert_close(dropped[is_kept], hidden[is_kept] / 0.75)
    assert hidden.grad is not None
    assert_close(hidden.grad, is_kept / 0.75)
    torch.manual_seed(3)
    assert torch.equal(dropout(hidden, 0.25, True), dropped)


def test_no_dropout_outside_training_or_at_zero() -> None:
    hidden = torch.rand(5, 7)
    assert dropout(hidden, 0.25, False) is hidden
    assert dropout(hidden, 0.0, True) is hidden


def test_it_keeps_the_type() -> None:
    assert dropout(torch.rand(5, 7).bfloat16(), 0.25, True).dtype == torch.bfloat16


def _plain(qkv: Tensor, mask: Tensor | None, keep_BHLL: Tensor, scale: float) -> Tensor:
    """Attention from the formula; qkv [B, L, H, 3, d]."""
    query, key, value = (part.transpose(1, 2) for part in qkv.unbind(dim=3))
    score = query @ key.transpose(-1, -2) / qkv.shape[-1] ** 0.5
    if mask is not None:
        score = score.masked_fill(~mask, -torch.inf)
    weight = score.softmax(dim=-1) * keep_BHLL * scale
    return (weight @ value).transpose(1, 2).reshape(qkv.shape[0] * qkv.shape[1], -1)


@pytest.mark.parametrize("kind", ["none", "padding", "documents"])
def test_attention_equals_the_formula(kind: str) -> None:
    num_rows, length, num_heads, size = 3, 7, 2, 5
    segment_BL = torch.tensor([[1, 1, 1, 2, 2, 3, 0], [1] * 7, [0] * 7])
    mask = attention_mask(segment_BL, has_padding=kind == "padding", separate_documents=kind == "documents")
    qkv = torch.randn(num_rows * length, num_heads * 3 * size, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(9)
    output = self_attention(qkv, num_rows, size, mask, 0.4)
    torch.manual_seed(9)
    keep, scale = draw_keep((num_rows, num_heads, length, length), 0.4)
    expected = _plain(qkv.view(num_rows, length, num_heads, 3, size), mask, keep, scale)
    assert_close(output, expected)
    slope = torch.randn_like(output)
    assert_close(torch.autograd.grad(output, qkv, slope)[0], torch.autograd.grad(expected, qkv, slope)[0])


def test_attention_in_bf16_follows_fp32() -> None:
    half = torch.randn(2 * 9, 4 * 3 * 8).bfloat16().requires_grad_()
    single = half.detach().float().requires_grad_()
    results = []
    for qkv in (half, single):
        torch.manual_seed(1)
        output = self_attention(qkv, 2, 8, None, 0.2)
        output.float().square().sum().backward()
        assert output.dtype == qkv.dtype
        results.append((output.float(), qkv.grad.float()))  # type: ignore[union-attr]
    assert_close(results[0][0], results[1][0], rtol=0.01, atol=0.02)
    assert_close(results[0][1], results[1][1], rtol=0.05, atol=0.1)
