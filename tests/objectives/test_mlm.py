"""The masked-language-model loss against torch's cross-entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.objectives import mlm
from pretrain.objectives.mlm import masked_lm_loss


@settings(max_examples=60, deadline=None)
@given(
    num_masked=st.integers(1, 12),
    vocab_size=st.integers(2, 40),
    seed=st.integers(0, 2**31),
    slice_bytes=st.sampled_from([4, 300, 1 << 20]),
)
def test_equals_torch(num_masked: int, vocab_size: int, seed: int, slice_bytes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_masked, vocab_size, generator=generator, dtype=torch.float64).requires_grad_()
    label = torch.randint(0, vocab_size, (num_masked,), generator=generator)
    label[torch.rand(num_masked, generator=generator) < 0.3] = -100
    label[0] = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlm, "_CPU_SLICE_BYTES", slice_bytes)
        loss, num_correct, num_labels = masked_lm_loss(logits, label)
        (gradient,) = torch.autograd.grad(2 * loss, logits)
    expected = F.cross_entropy(logits, label)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(2 * expected, logits)[0])
    assert int(num_correct) == int((logits.argmax(dim=-1) == label).sum())
    assert int(num_labels) == int((label != -100).sum())


@pytest.mark.fault("degenerate-batch")
def test_without_labels_the_loss_is_zero_with_gradient() -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    loss, num_correct, num_labels = masked_lm_loss(logits, torch.full((3,), -100))
    loss.backward()
    assert (loss.item(), int(num_correct), int(num_labels)) == (0.0, 0, 0)
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.fault("degenerate-batch")
def test_without_positions_the_loss_is_zero_with_gradient() -> None:
    logits = torch.randn(0, 5, requires_grad=True)
    loss, *_ = masked_lm_loss(logits, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0


def test_bf16_logits_cost_what_their_fp32_values_cost() -> None:
    half = (8 * torch.randn(6, 50)).bfloat16().requires_grad_()
    label = torch.randint(0, 50, (6,))
    loss, *_ = masked_lm_loss(half, label)
    loss.backward()
    single = half.detach().float().requires_grad_()
    expected = F.cross_entropy(single, label)
    expected.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(half.grad, single.grad.bfloat16())  # type: ignore[union-attr]


def test_padded_words_at_minus_infinity_are_never_chosen() -> None:
    logits = torch.randn(4, 6)
    padded = torch.cat([logits, torch.full((4, 2), -torch.inf)], dim=1).requires_grad_()
    label = torch.tensor([0, 5, 2, 3])
    loss, *_ = masked_lm_loss(padded, label)
    loss.backward()
    torch.testing.assert_close(loss, F.cross_entropy(logits, label))
    assert padded.grad is not None
    assert not padded.grad[:, 6:].any()


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"logits \[M, V\]"):
        masked_lm_loss(torch.zeros(3, 5), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slice_bytes", [300, 1 << 20])
def test_a_bias_is_added_and_columns_without_a_word_count_for_nothing(
    dtype: torch.dtype, slice_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlm, "_CPU_SLICE_BYTES", slice_bytes)
    logits, bias = (torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in ((9, 64), (64,)))
    label = torch.randint(0, 61, (9,))
    label[4] = -100
    loss, num_correct, num_labels = masked_lm_loss(logits * 1, label, bias_V=bias, num_words=61)
    found = torch.autograd.grad(2 * loss, (logits, bias))
    exact = [tensor.detach().double().requires_grad_() for tensor in (logits, bias)]
    summed = (exact[0] + exact[1])[:, :61]
    expected = F.cross_entropy(summed, label)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    assert (int(num_correct), int(num_labels)) == (int((summed.argmax(dim=-1) == label).sum()), 8)
    for gradient, wanted in zip(found, torch.autograd.grad(2 * expected, exact), strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.double(), wanted, rtol=tolerance, atol=1e-6)
    assert not found[0][:, 61:].any()


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_gradient_takes_the_place_of_the_logits_so_there_is_one_backward(has_bias: bool) -> None:
    logits = torch.randn(4, 6, requires_grad=True) * 1
    loss, *_ = masked_lm_loss(logits, torch.tensor([0, 5, 2, 3]), bias_V=torch.zeros(6) if has_bias else None)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert gradient.data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="there is no second; compute the loss again"):
        torch.autograd.grad(loss, logits)


def test_who_needs_the_logits_afterwards_is_told() -> None:
    """torch's own check, which a write through `.data` would evade."""
    logits = torch.randn(4, 6, requires_grad=True).exp()  # exp keeps its result for its derivative
    loss, *_ = masked_lm_loss(logits, torch.tensor([0, 5, 2, 3]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_leaf_keeps_its_values() -> None:
    logits = torch.randn(4, 6, requires_grad=True)
    before = logits.detach().clone()
    loss, *_ = masked_lm_loss(logits, torch.tensor([0, 5, 2, 3]))
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in "12")
    assert torch.equal(logits, before)
    assert torch.equal(first, second)
