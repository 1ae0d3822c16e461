"""Attention by document, with and without dropout, against the plain formula by autograd, in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pretrain.kernels.attention_dropout import AttentionDropout
from pretrain.kernels.dropout_mask import drop_threshold, keep_mask, keep_scale
from pretrain.model.attention import attention_mask, self_attention
from pretrain.model.dropout import ATTENTION_WEIGHTS, DropoutKey
from pretrain.model.token_rows import TokenRows, plan_rows

NUM_HEADS, SIZE, LENGTH = 2, 5, 7
SEGMENTS = np.array([[1, 1, 1, 2, 2, 3, 0], [1] * 7, [0] * 7, [1, 2, 2, 2, 3, 3, 3]])


def _drop(probability: float, length: int, first_head: int = 0, num_heads: int = NUM_HEADS) -> AttentionDropout | None:
    words = DropoutKey.of(1, 7, 4, torch.device("cpu")).at(2)[ATTENTION_WEIGHTS]
    return AttentionDropout(probability, words, first_head, num_heads, length) if probability else None


def _kept(segment_BL: Tensor, probability: float, *, separate_documents: bool) -> Tensor:
    """What the weights are multiplied with, [B, H, L, L]: keys count from the first token of their document."""
    drop = _drop(probability, LENGTH)
    if drop is None:
        return torch.ones(())
    assert drop.words is not None
    place_BL = torch.arange(segment_BL.numel()).view_as(segment_BL)
    line_BHL = place_BL[:, None] * NUM_HEADS + torch.arange(NUM_HEADS)[:, None]
    keep_BHLL = keep_mask(drop.words, line_BHL, LENGTH, probability)
    first_BL = torch.zeros_like(segment_BL)
    if separate_documents:
        first_BL = (segment_BL[:, :, None] == segment_BL[:, None, :]).int().argmax(dim=-1)
    key_BL = (torch.arange(LENGTH) - first_BL)[:, None, None, :].expand_as(keep_BHLL)
    return keep_BHLL.gather(3, key_BL) * keep_scale(drop_threshold(probability))


def _plain(qkv_BLHpd: Tensor, mask: Tensor, kept_BHLL: Tensor) -> Tensor:
    """Attention of whole rows from the formula, [B * L, H * d]."""
    query, key, value = (part.transpose(1, 2) for part in qkv_BLHpd.unbind(dim=3))
    score = (query @ key.transpose(-1, -2) / SIZE**0.5).masked_fill(~mask, -torch.inf)
    weight = score.softmax(dim=-1) * kept_BHLL
    return (weight @ value).transpose(1, 2).flatten(0, 1).flatten(1)


def _random(num_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_tokens, NUM_HEADS * 3 * SIZE, dtype=torch.float64, generator=generator).requires_grad_()


@pytest.mark.parametrize("probability", [0.0, 0.4])
@pytest.mark.parametrize("separate_documents", [False, True])
@pytest.mark.parametrize("multiple", [1, SEGMENTS.size])
def test_documents_attend_to_themselves(multiple: int, separate_documents: bool, probability: float) -> None:
    rows = plan_rows(SEGMENTS, separate_documents=separate_documents, multiple=multiple)
    segment_BL = torch.from_numpy(SEGMENTS)
    qkv = _random(rows.num_tokens)
    output = rows.spread(self_attention(qkv, rows, SIZE, _drop(probability, LENGTH)))
    grid = rows.spread(qkv).view(*SEGMENTS.shape, NUM_HEADS, 3, SIZE)
    mask = attention_mask(segment_BL, separate_documents=separate_documents)
    expected = _plain(grid, mask, _kept(segment_BL, probability, separate_documents=separate_documents))
    is_token = segment_BL.flatten() > 0
    assert_close(output[is_token], expected[is_token])
    slope = torch.randn_like(expected) * is_token[:, None]
    assert_close(torch.autograd.grad(output, qkv, slope)[0], torch.autograd.grad(expected, qkv, slope)[0])


def test_full_rows_are_documents() -> None:
    segment_BL = np.ones((3, LENGTH), np.int64)
    planned = plan_rows(segment_BL, separate_documents=True)
    qkv = _random(3 * LENGTH)
    drop = _drop(0.4, LENGTH)
    assert_close(self_attention(qkv, TokenRows(3, LENGTH), SIZE, drop), self_attention(qkv, planned, SIZE, drop))


def test_a_share_of_the_heads_drops_the_same() -> None:
    qkv, rows = torch.randn(2 * 9, 4 * 3 * 8), TokenRows(2, 9)
    whole = self_attention(qkv, rows, 8, _drop(0.2, 9, num_heads=4))
    half = self_attention(qkv[:, 48:], rows, 8, _drop(0.2, 9, first_head=2, num_heads=4))
    assert_close(half, whole[:, 16:])


@pytest.mark.parametrize("probability", [0.0, 0.3])
@pytest.mark.parametrize("threads", [1, 2])
def test_cpp_in_fp32_follows_torch_in_fp64(probability: float, threads: int) -> None:
    """Also where scores are far apart; the first key of the first document stands out by 200."""
    segment_BL = np.repeat([[1, 2, 3, 0]], [70, 1, 37, 2], axis=1)
    rows = plan_rows(segment_BL, separate_documents=True)
    wide = _random(rows.num_tokens)
    with torch.no_grad():
        wide[:, :SIZE] += 1
        wide[0, SIZE : 2 * SIZE] += 200
    single = wide.detach().float().requires_grad_()
    slope = torch.randn(rows.num_tokens, NUM_HEADS * SIZE, dtype=torch.float64)
    torch.set_num_threads(threads)
    try:
        outputs = [self_attention(qkv, rows, SIZE, _drop(probability, 110)) for qkv in (single, wide)]
        gradients = [torch.autograd.grad(o, x, slope.to(x)) for o, x in zip(outputs, (single, wide), strict=True)]
    finally:
        torch.set_num_threads(1)
    assert_close(outputs[0].double(), outputs[1], rtol=1e-5, atol=1e-5)
    assert_close(gradients[0][0].double(), gradients[1][0], rtol=1e-4, atol=1e-3)


def test_nan_and_infinity_are_not_hidden() -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        qkv = torch.randn(2 * 20, NUM_HEADS * 3 * SIZE)
        qkv[3, SIZE] = value  # a key of the first row and head
        drop = _drop(0.3, 20)
        output, wide = (self_attention(x, TokenRows(2, 20), SIZE, drop) for x in (qkv, qkv.double()))
        assert torch.equal(output.isnan(), wide.isnan())
        assert output[:20, :SIZE].isnan().any()
        assert output[20:].isfinite().all()


def test_bf16_follows_fp32() -> None:
    half = torch.randn(2 * 9, 4 * 3 * 8).bfloat16().requires_grad_()
    single = half.detach().float().requires_grad_()
    results = []
    for qkv in (half, single):
        output = self_attention(qkv, TokenRows(2, 9), 8, _drop(0.2, 9, num_heads=4))
        output.float().square().sum().backward()
        assert output.dtype == qkv.dtype
        results.append((output.float(), qkv.grad.float()))  # type: ignore[union-attr]
    assert_close(results[0][0], results[1][0], rtol=0.01, atol=0.02)
    assert_close(results[0][1], results[1][1], rtol=0.05, atol=0.1)


@pytest.mark.slow
def test_a_compiled_graph_takes_it_whole_for_any_number_of_documents() -> None:
    compiled = torch.compile(self_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for segment_BL in (SEGMENTS, SEGMENTS[::2]):
        rows = plan_rows(segment_BL, separate_documents=True)
        qkv = _random(rows.num_tokens)
        results = [attend(qkv, rows, SIZE, _drop(0.4, LENGTH)) for attend in (self_attention, compiled)]
        gradients = [torch.autograd.grad(output.square().sum(), qkv)[0] for output in results]
        assert_close(*results)
        assert_close(*gradients)
