"""The cross-entropy kernel against its twin: loss, counts, both gradients, and no second copy of the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as distributed
from torch import Tensor
from torch.testing import assert_close

from pretrain.kernels import cross_entropy
from pretrain.objectives import mlm
from pretrain.objectives.mlm import VocabularyShard

WORDS, COLUMNS = 1_037, 1_088


def make(num_rows: int, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, a bias and labels; every third row has none, one is predicted, and one has two equal largest logits."""
    generator = torch.Generator().manual_seed(num_rows)
    logits = 3 * torch.randn(num_rows, COLUMNS, generator=generator)
    logits[:, WORDS:] = 50.0  # what stands in unused columns must not matter
    bias = torch.randn(COLUMNS, generator=generator)
    label = torch.randint(0, WORDS, (num_rows,), generator=generator)
    label[1::3] = mlm.IGNORED_LABEL
    if num_rows > 2:
        logits[0, label[0]] = 30.0
        logits[2, 5], logits[2, 1_030], label[2] = 40.0 - bias[5], 40.0 - bias[1_030], 1_030
    return logits.to(device, dtype), bias.to(device, dtype), label.to(device)


def run(function: Any, made: tuple[Tensor, Tensor, Tensor], **options: Any) -> list[Tensor]:
    """Loss, counts, and the gradients of logits and bias for a loss that is weighed by 2."""
    logits, bias, label = made
    logits, bias = logits.clone().requires_grad_(), bias.clone().requires_grad_()
    loss, num_correct, num_labels = function(logits * 1.0, label, bias_V=bias, **options)
    return [loss.detach(), num_correct, num_labels, *torch.autograd.grad(2 * loss, (logits, bias))]


@pytest.mark.parametrize("num_rows", [0, 1, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_its_twin(num_rows: int, dtype: torch.dtype, device: torch.device) -> None:
    made = make(num_rows, device, dtype)
    found = run(cross_entropy.masked_lm_loss, made, num_words=WORDS)
    expected = run(mlm.masked_lm_loss, made, num_words=WORDS)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
    assert [int(number) for number in found[1:3]] == [int(number) for number in expected[1:3]]
    for gradient, wanted in zip(found[3:], expected[3:], strict=True):
        assert gradient.dtype == dtype
        assert_close(gradient, wanted, rtol=tolerance, atol=1e-6)
    assert not found[3][:, WORDS:].any()
    assert not found[4][WORDS:].any()


def test_without_a_bias_all_columns_are_words(device: torch.device) -> None:
    logits, _, label = make(4, device)
    both = []
    for function in (cross_entropy.masked_lm_loss, mlm.masked_lm_loss):
        leaf = logits.t().contiguous().t().requires_grad_()  # rows that are not contiguous
        loss, *counts = function(leaf, label)
        both.append([loss.detach(), *counts, *torch.autograd.grad(loss, leaf)])
        assert torch.equal(leaf, logits)  # a leaf keeps its values
    for found, expected in zip(*both, strict=True):
        assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_the_gradient_takes_the_place_of_the_logits_once(device: torch.device) -> None:
    logits, bias, label = make(5, device)
    product = logits.requires_grad_() * 1.0
    loss, *_ = cross_entropy.masked_lm_loss(product, label, bias_V=bias, num_words=WORDS)
    (gradient,) = torch.autograd.grad(loss, product, retain_graph=True)
    assert gradient.data_ptr() == product.data_ptr()
    with pytest.raises(RuntimeError, match="there is no second; compute the loss again"):
        torch.autograd.grad(loss, product)


@pytest.mark.parametrize("place", [(0, 3), (1, 3)])  # a row with a label, and one without
def test_what_is_not_finite_shows(place: tuple[int, int], device: torch.device) -> None:
    logits, bias, label = make(4, device)
    logits[place] = torch.nan
    loss, _, _, *gradients = run(cross_entropy.masked_lm_loss, (logits, bias, label), num_words=WORDS)
    assert loss.isnan()
    assert all(gradient.isnan().any() for gradient in gradients)


def test_fp64_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="train.kernels=torch"):
        cross_entropy.masked_lm_loss(torch.zeros(1, 4, dtype=torch.float64, device=device), torch.tensor([1]))


def _on_shards() -> list[Tensor]:
    distributed.init_process_group("gloo")
    rank, half = distributed.get_rank(), COLUMNS // 2
    logits, bias, label = make(7, torch.device("cpu"))
    own = slice(rank * half, (rank + 1) * half)
    made = (logits[:, own], bias[own], label)
    shard = VocabularyShard(rank * half, distributed.group.WORLD)
    return run(cross_entropy.masked_lm_loss, made, shard=shard, num_words=min(half, WORDS - rank * half))


@pytest.mark.slow
def test_shards_of_the_vocabulary_give_the_whole() -> None:
    from forked import run_ranks

    expected = run(mlm.masked_lm_loss, make(7, torch.device("cpu")), num_words=WORDS)
    first, second = run_ranks(2, _on_shards)
    for found in (first, second):
        assert_close(found[:3], expected[:3], rtol=1e-6, atol=1e-6)
    assert_close(torch.cat([first[3], second[3]], dim=1), expected[3], rtol=1e-6, atol=1e-7)
    assert_close(torch.cat([first[4], second[4]]), expected[4], rtol=1e-6, atol=1e-7)
