"""The contrastive loss in Triton, which draws its own negatives, against its definition over drawn pairs in fp64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from contrast_cases import CASES, LIMITS, Case, defined, deviation, drawn, tokens, vectors
from forked import run_ranks
from parity import build, load, take_steps

from pretrain.config.sections import RunConfig
from pretrain.errors import ConfigError
from pretrain.kernels import contrast
from pretrain.kernels.contrast import drawn_contrastive_loss
from pretrain.kernels.pairs import pair_key

PADDED = CASES["hidden size no power of two"]
SMALL = Case(4, 16, 40, 7)


def _assert_close(found: list[torch.Tensor], expected: list[torch.Tensor], dtype: torch.dtype) -> None:
    loss_limit, gradient_limit = LIMITS[dtype]
    limits = (loss_limit, gradient_limit, gradient_limit)
    off = [deviation(*both) for both in zip(found, expected, strict=True)]
    assert all(value <= limit for value, limit in zip(off, limits, strict=True)), (off, limits)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_definition(case: Case, device: torch.device) -> None:
    _assert_close(drawn(case, torch.float32, device), defined(case, torch.float32), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_equals_the_definition_in_16_bits(dtype: torch.dtype, device: torch.device) -> None:
    case = replace(PADDED, num_negatives=10)
    _assert_close(drawn(case, dtype, device), defined(case, dtype), dtype)


def test_a_program_for_each_anchor_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(contrast, "_INTERPRETED_ANCHORS", 1)
    case = replace(SMALL, num_rows=2, length=7)
    _assert_close(drawn(case, torch.float32, device), defined(case, torch.float32), torch.float32)


@pytest.mark.parametrize("case", [SMALL, CASES["few valid tokens"], CASES["no valid token"]])
def test_padding_may_be_left_out_and_tokens_in_any_order(case: Case, device: torch.device) -> None:
    found = drawn(case, torch.float32, device, is_shuffled=True)
    _assert_close(found, defined(case, torch.float32), torch.float32)


def test_gradient_scales_with_what_comes_after(device: torch.device) -> None:
    for one, other in zip(
        drawn(SMALL, torch.float32, device), drawn(SMALL, torch.float32, device, factor=4.0), strict=True
    ):
        assert torch.equal(4 * one, other)


def test_shares_of_the_anchors_add_up(device: torch.device) -> None:
    """What the ranks of a tensor-parallel group compute; one of them has no anchor at all."""
    num_tokens = SMALL.num_rows * SMALL.length
    bounds = [0, 0, 17, num_tokens]
    parts = [
        drawn(SMALL, torch.float32, device, own_tokens=range(first, end))
        for first, end in zip(bounds, bounds[1:], strict=False)
    ]
    assert not any(value.any() for value in parts[0])
    assert not parts[1][1][17:].any()
    _assert_close([sum(values) for values in zip(*parts, strict=True)], defined(SMALL, torch.float32), torch.float32)  # type: ignore[misc]


def _loss(case: Case, device: torch.device, **changes: Any) -> torch.Tensor:
    valid_BL, segment_BL, anchor_BL = (tensor.to(device) for tensor in tokens(case))
    hidden_TD, embedding_TD = (tensor.to(device) for tensor in vectors(case, torch.float32))
    arguments: dict[str, Any] = {
        "hidden_TD": hidden_TD,
        "embedding_TD": embedding_TD,
        "valid_BL": valid_BL,
        "segment_BL": segment_BL,
        "anchor_BL": anchor_BL,
        "key_2": pair_key(1, 2, device),
        "window": case.window,
        "num_negatives": case.num_negatives,
        "temperature": 0.07,
    }
    return drawn_contrastive_loss(**{**arguments, **changes})


def test_mixed_dtypes_have_an_fp32_table(device: torch.device) -> None:
    hidden_TD, embedding_TD = (tensor.to(device) for tensor in vectors(SMALL, torch.bfloat16))
    mixed = _loss(SMALL, device, hidden_TD=hidden_TD, embedding_TD=embedding_TD.float())
    assert mixed == _loss(SMALL, device, hidden_TD=hidden_TD.float(), embedding_TD=embedding_TD.float())
    assert mixed != _loss(SMALL, device, hidden_TD=hidden_TD, embedding_TD=embedding_TD)


def test_without_a_gradient_the_loss_is_the_same(device: torch.device) -> None:
    hidden_TD = vectors(SMALL, torch.float32)[0].to(device).requires_grad_()
    loss = _loss(SMALL, device, hidden_TD=hidden_TD)
    with torch.no_grad():
        without = _loss(SMALL, device, hidden_TD=hidden_TD)
    assert loss.requires_grad
    assert not without.requires_grad
    assert without == loss == _loss(SMALL, device)


@pytest.mark.fault("degenerate-batch")
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's, in Triton's interpreter
def test_a_value_that_is_not_finite_is_not_hidden(device: torch.device) -> None:
    for value in (float("nan"), float("inf")):
        hidden_TD, _ = vectors(SMALL, torch.float32)
        hidden_TD[5, 3] = value
        assert _loss(SMALL, device, hidden_TD=hidden_TD.to(device)).isnan()
    # But a token that takes no part may hold anything.
    valid_BL, _, anchor_BL = tokens(SMALL)
    valid_BL[0, 5] = anchor_BL[0, 5] = False
    changes = {"valid_BL": valid_BL.to(device), "anchor_BL": anchor_BL.to(device)}
    assert _loss(SMALL, device, hidden_TD=hidden_TD.to(device), **changes).isfinite()


def test_wrong_arguments_are_named(device: torch.device) -> None:
    valid_BL, _, anchor_BL = tokens(SMALL)
    hidden_TD, _ = vectors(SMALL, torch.float32)
    for change, words in (
        ({"hidden_TD": hidden_TD.double()}, "hidden_TD must be fp32, bf16 or fp16, found torch.float64"),
        ({"embedding_TD": hidden_TD[:, :5]}, "embedding_TD must be"),
        ({"hidden_TD": hidden_TD[:5]}, "hidden_TD must be"),
        ({"anchor_BL": anchor_BL.long()}, "anchor_BL must be bool"),
        ({"valid_BL": valid_BL.long()}, "valid_BL must be bool"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"place_T": torch.arange(64)}, "place_T and token_G must both"),
        ({"place_T": torch.arange(5), "token_G": torch.arange(64)}, r"hidden_TD must be \[5, D\]"),
        ({"num_negatives": 0}, "num_negatives must be at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            _loss(SMALL, device, **change)
    with pytest.raises(ConfigError, match="micro_batch_size"):
        _loss(replace(SMALL, num_rows=1), device)


# -- in the model and its engine ---------------------------------------------------------------------------------------


def _losses(config: RunConfig) -> list[tuple[float, float, float, float]]:
    """Of two steps of the real engine, in a process of its own."""
    from pretrain.engine.plain import PlainEngine
    from pretrain.parallel.launch import choose_device, read_launch, start_process_group
    from pretrain.parallel.mesh import start_mesh

    device = choose_device(config.run.device, read_launch())
    start_process_group(read_launch(), device)
    model, source = build(config)
    assert model.layers.kernels == config.train.kernels
    return take_steps(PlainEngine(config, model, device, start_mesh(config.parallel, device)), source, 0, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "overrides"),
    [
        (1, ("data.row_mode=pack",)),
        (1, ("objective.anchors=masked", "objective.exclude_special=false")),
        (2, ("parallel.tensor=2", "data.row_mode=document", "model.hidden_dropout=0", "model.attention_dropout=0")),
    ],
)
def test_the_engine_has_the_same_losses_with_either_kernels(
    tmp_path: Path, num_ranks: int, overrides: tuple[str, ...], device: torch.device
) -> None:
    if num_ranks > 1 and device.type == "cuda":
        pytest.skip("two ranks would share the GPU")
    options = ("train.global_batch_size=4", *overrides)
    found, expected = (
        run_ranks(num_ranks, _losses, load(tmp_path, *options, f"train.kernels={kernels}"))[0]
        for kernels in ("triton", "torch")
    )
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
