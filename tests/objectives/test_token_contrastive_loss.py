"""The contrastive loss: the authors' golden values, a naive version by autograd, and every way to have nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pretrain.objectives import taco
from pretrain.objectives.taco import sample_pairs, token_contrastive_loss

HERE = Path(__file__).parent


def _naive(
    hidden: Tensor, embedding: Tensor, positive_BL: Tensor, negative_BLK: Tensor, temperature: float, anchor_BL: Tensor
) -> Tensor:
    """Written from the formula, one anchor after the other."""
    semantics = hidden - embedding
    constant = semantics.detach()
    losses = []
    for row, column in anchor_BL.nonzero().tolist():
        if positive_BL[row, column] < 0 or (negative_BLK[row, column] < 0).any():
            continue
        others = [constant[row, positive_BL[row, column]], *constant.flatten(0, 1)[negative_BLK[row, column]]]
        similarity = F.cosine_similarity(semantics[row, column][None], torch.stack(others), dim=-1)
        losses.append(-(similarity / temperature).log_softmax(dim=0)[0])
    return torch.stack(losses).mean() if losses else semantics.sum() * 0


def _inputs(shape: tuple[int, int, int], num_negatives: int, *, seed: int, invalid: float = 0.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    embedding = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    valid_BL = torch.rand(shape[:2], generator=generator) >= invalid
    positive_BL, negative_BLK = sample_pairs(
        valid_BL, window=2, num_negatives=num_negatives, seed=seed, micro_batch_index=0
    )
    return {"hidden": hidden, "embedding": embedding, "positive_BL": positive_BL, "negative_BLK": negative_BLK}


def _loss_and_gradients(inputs: dict[str, Tensor], **options: object) -> tuple[Tensor, Tensor, Tensor]:
    hidden, embedding = inputs["hidden"], inputs["embedding"]
    pairs = inputs["positive_BL"], inputs["negative_BLK"]
    loss = token_contrastive_loss(hidden, embedding, *pairs, **{"temperature": 0.07, **options})  # type: ignore[arg-type]
    return loss, *torch.autograd.grad(loss, (hidden, embedding))


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["all", "masked"])
def test_equals_the_golden_values(case: str) -> None:
    golden = np.load(HERE / f"taco_loss_{case}.npz")
    masked_BL = torch.from_numpy(golden["mlm_mask"])
    length = masked_BL.shape[1]
    inputs = {
        "hidden": torch.from_numpy(golden["hidden"]).requires_grad_(),
        "embedding": torch.from_numpy(golden["embedding"]).requires_grad_(),
        "positive_BL": torch.from_numpy(golden["positive_col"]),
        "negative_BLK": torch.from_numpy(golden["negative_row"] * length + golden["negative_col"]),
    }
    anchors = taco.anchor_mask(str(golden["anchor_mode"]), masked_BL, torch.ones_like(masked_BL))  # type: ignore[arg-type]
    loss, *gradients = _loss_and_gradients(inputs, temperature=float(golden["temperature"]), anchor_mask_BL=anchors)
    assert abs(loss.item() - float(golden["loss"])) <= 1e-12 * float(golden["loss"])
    for gradient, name in zip(gradients, ("grad_hidden", "grad_embedding"), strict=True):
        expected = torch.from_numpy(golden[name])
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(2, 4), st.integers(1, 9), st.integers(1, 12)),
    num_negatives=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    invalid=st.sampled_from([0.0, 0.3, 0.8]),
    share=st.sampled_from([1.0, 0.5, 0.0]),
)
def test_equals_the_naive_version(
    shape: tuple[int, int, int], num_negatives: int, seed: int, invalid: float, share: float
) -> None:
    inputs = _inputs(shape, num_negatives, seed=seed, invalid=invalid)
    anchors = torch.rand(shape[:2], generator=torch.Generator().manual_seed(seed + 1)) < share
    loss, *gradients = _loss_and_gradients(inputs, temperature=0.2, anchor_mask_BL=anchors)
    naive = _naive(*inputs.values(), 0.2, anchors)  # type: ignore[arg-type]
    expected = torch.autograd.grad(naive, (inputs["hidden"], inputs["embedding"]))
    torch.testing.assert_close(loss, naive, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients, list(expected), rtol=1e-9, atol=1e-11)  # a short g has a large inverse


@pytest.mark.parametrize(("shape", "num_negatives"), [((2, 512, 16), 200), ((2, 1, 4), 1), ((3, 64, 257), 33)])
def test_equals_the_naive_version_at_larger_shapes(shape: tuple[int, int, int], num_negatives: int) -> None:
    inputs = _inputs(shape, num_negatives, seed=5)
    anchors = torch.rand(shape[:2], generator=torch.Generator().manual_seed(1)) < 0.3
    loss, *gradients = _loss_and_gradients(inputs, anchor_mask_BL=anchors)
    naive = _naive(*inputs.values(), 0.07, anchors)  # type: ignore[arg-type]
    expected = torch.autograd.grad(naive, (inputs["hidden"], inputs["embedding"]))
    torch.testing.assert_close(loss, naive, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients, list(expected), rtol=1e-9, atol=1e-13)


def test_gpu_route_visits_all_tokens_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = _inputs((3, 8, 6), 4, seed=2, invalid=0.3)
    anchors = torch.rand(3, 8) < 0.5
    expected = _loss_and_gradients(inputs, anchor_mask_BL=anchors)
    monkeypatch.setattr(taco, "_anchors_to_visit", lambda is_anchor_T: torch.arange(len(is_anchor_T)))
    torch.testing.assert_close(_loss_and_gradients(inputs, anchor_mask_BL=anchors), expected)


# -- where the gradient goes -------------------------------------------------------------------------------------------


def test_gradient_flows_through_the_anchor_only() -> None:
    inputs = _inputs((2, 6, 5), 3, seed=0)
    anchors = torch.zeros(2, 6, dtype=torch.bool)
    anchors[0, 2] = True
    _, grad_hidden, grad_embedding = _loss_and_gradients(inputs, anchor_mask_BL=anchors)
    assert grad_hidden[0, 2].abs().min() > 0
    assert not grad_hidden[~anchors].any()
    assert not grad_embedding[~anchors].any()


def test_gradient_of_embedding_is_the_negative_and_scales_with_what_comes_after() -> None:
    inputs = _inputs((2, 6, 5), 3, seed=0)
    _, grad_hidden, grad_embedding = _loss_and_gradients(inputs)
    assert torch.equal(grad_hidden, -grad_embedding)
    loss = token_contrastive_loss(*inputs.values(), temperature=0.07)  # type: ignore[arg-type,misc]
    (scaled,) = torch.autograd.grad(3 * loss, inputs["hidden"])
    torch.testing.assert_close(scaled, 3 * grad_hidden)


def test_only_one_side_may_need_a_gradient() -> None:
    inputs = _inputs((2, 6, 5), 3, seed=0)
    _, grad_hidden, _ = _loss_and_gradients(inputs)
    inputs["embedding"] = inputs["embedding"].detach()
    loss = token_contrastive_loss(*inputs.values(), temperature=0.07)  # type: ignore[arg-type,misc]
    torch.testing.assert_close(torch.autograd.grad(loss, inputs["hidden"])[0], grad_hidden)


def test_inputs_stay_untouched_and_no_gradient_means_none() -> None:
    inputs = _inputs((2, 6, 5), 3, seed=0)
    copies = {name: tensor.detach().clone() for name, tensor in inputs.items()}
    with torch.no_grad():
        loss = token_contrastive_loss(*inputs.values(), temperature=0.07)  # type: ignore[arg-type,misc]
    assert not loss.requires_grad
    torch.testing.assert_close(loss, _loss_and_gradients(inputs)[0].detach())
    assert all(torch.equal(tensor, copies[name]) for name, tensor in inputs.items())


# -- nothing to compare ------------------------------------------------------------------------------------------------


def _assert_zero(result: tuple[Tensor, Tensor, Tensor]) -> None:
    loss, grad_hidden, grad_embedding = result
    assert loss.item() == 0
    assert not grad_hidden.any()
    assert not grad_embedding.any()


@pytest.mark.fault("degenerate-batch")
def test_no_anchor_costs_nothing() -> None:
    inputs = _inputs((2, 4, 3), 2, seed=0)
    _assert_zero(_loss_and_gradients(inputs, anchor_mask_BL=torch.zeros(2, 4, dtype=torch.bool)))
    _assert_zero(_loss_and_gradients({**inputs, "positive_BL": torch.full((2, 4), -1)}))
    _assert_zero(_loss_and_gradients({**inputs, "negative_BLK": torch.full((2, 4, 2), -1)}))


@pytest.mark.fault("degenerate-batch")
def test_no_valid_token_and_rows_of_one_token_cost_nothing() -> None:
    _assert_zero(_loss_and_gradients(_inputs((2, 4, 3), 2, seed=0, invalid=1.1)))
    _assert_zero(_loss_and_gradients(_inputs((2, 1, 3), 2, seed=0)))


def test_one_missing_negative_is_enough_not_to_be_an_anchor() -> None:
    inputs = _inputs((2, 4, 3), 2, seed=0)
    inputs["negative_BLK"][0, 0, 1] = -1
    _, grad_hidden, _ = _loss_and_gradients(inputs)
    assert not grad_hidden[0, 0].any()
    assert grad_hidden[0, 1].any()


def test_vectors_without_direction_have_cosine_and_gradient_zero() -> None:
    inputs = _inputs((2, 4, 3), 2, seed=0)
    with torch.no_grad():
        inputs["hidden"][0] = inputs["embedding"][0]
    loss, grad_hidden, grad_embedding = _loss_and_gradients(inputs)
    assert torch.isfinite(loss)
    assert torch.isfinite(grad_hidden).all()
    assert not grad_hidden[0].any()
    assert not grad_embedding[0].any()
    same = {**inputs, "hidden": inputs["embedding"].detach().clone().requires_grad_()}
    assert _loss_and_gradients(same)[0].item() == pytest.approx(np.log(3))


# -- types, memory, wrong arguments ------------------------------------------------------------------------------------


def test_bf16_inputs_are_compared_in_fp32() -> None:
    inputs = _inputs((2, 16, 32), 8, seed=0)
    half = {k: v.detach().bfloat16().requires_grad_() if v.is_floating_point() else v for k, v in inputs.items()}
    single = {k: v.detach().float().requires_grad_() if v.is_floating_point() else v for k, v in half.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, grad_hidden, grad_embedding = _loss_and_gradients(half)
    expected = _loss_and_gradients(single)
    assert loss.dtype == torch.float32
    assert loss.item() == expected[0].item()
    assert grad_hidden.dtype == grad_embedding.dtype == torch.bfloat16
    assert torch.equal(grad_hidden, expected[1].bfloat16())


def test_no_gathered_tensor_exists() -> None:
    num_rows, length, size, num_negatives = 4, 64, 64, 64
    inputs = _inputs((num_rows, length, size), num_negatives, seed=0)
    inputs = {k: v.detach().float().requires_grad_() if v.is_floating_point() else v for k, v in inputs.items()}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _loss_and_gradients(inputs)
    largest = max(event.cpu_memory_usage for event in profiler.events())
    token_bytes = num_rows * length * size * 4
    assert 0 < largest < 8 * token_bytes < num_negatives * token_bytes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"embedding": torch.zeros(2, 4, 5)}, "one shape"),
        ({"hidden": torch.zeros(4, 3), "embedding": torch.zeros(4, 3)}, "one shape"),
        ({"positive_BL": torch.zeros(2, 5, dtype=torch.int64)}, "positive_BL"),
        ({"negative_BLK": torch.zeros(2, 4, dtype=torch.int64)}, "negative_BLK"),
        ({"positive_BL": torch.zeros(2, 4, dtype=torch.int32)}, "int64"),
    ],
)
def test_wrong_tensors_are_named(change: dict[str, Tensor], words: str) -> None:
    inputs = {**_inputs((2, 4, 3), 2, seed=0), **change}
    with pytest.raises(ValueError, match=words):
        token_contrastive_loss(*inputs.values(), temperature=0.07)  # type: ignore[arg-type,misc]


def test_wrong_options_are_named() -> None:
    inputs = _inputs((2, 4, 3), 2, seed=0)
    with pytest.raises(ValueError, match="temperature"):
        _loss_and_gradients(inputs, temperature=0.0)
    with pytest.raises(ValueError, match="anchor_mask_BL"):
        _loss_and_gradients(inputs, anchor_mask_BL=torch.ones(2, 4))
