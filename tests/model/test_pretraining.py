"""The module that DeepSpeed wraps: both losses of a micro-batch, and that it trains, under ZeRO-3 too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.config.sections import ModelSection, ObjectiveSection
from pretrain.errors import ConfigError
from pretrain.model.layer_spec import plain_layers
from pretrain.model.pretraining import BertForPretraining
from pretrain.objectives.mlm import masked_lm_loss
from pretrain.objectives.taco import sample_pairs, token_contrastive_loss

CONFIG = ModelSection(
    num_layers=2, hidden_size=16, num_attention_heads=2, ffn_hidden_size=32, hidden_dropout=0.0, attention_dropout=0.0
)
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]


def _model(seed: int = 1, **objective: Any) -> BertForPretraining:
    return BertForPretraining(CONFIG, 40, plain_layers(), ObjectiveSection(num_negatives=4, **objective), seed=seed)


def _micro_batch(lengths: tuple[int, ...] = (12, 12, 9)) -> Arguments:
    generator = torch.Generator().manual_seed(0)
    shape = len(lengths), 12
    ids_BL = torch.randint(0, 40, shape, generator=generator)
    segment_BL = (torch.arange(12) < torch.tensor(lengths)[:, None]).long()
    index_M = torch.tensor([2, 7, 14, 0, 0])
    label_M = torch.tensor([5, 6, 7, -100, -100])
    return ids_BL, segment_BL, segment_BL.bool(), index_M, label_M, 3


def test_both_losses_are_what_their_functions_say() -> None:
    model = _model(contrastive_weight=0.5, temperature=0.1)
    ids_BL, segment_BL, valid_BL, index_M, label_M, index = arguments = _micro_batch()
    losses = model(*arguments)
    hidden_TD, embedding_TD = model.encode(ids_BL, segment_BL)
    mlm, num_correct, num_labels = masked_lm_loss(model.predict(hidden_TD, index_M), label_M)
    pairs = sample_pairs(valid_BL, window=2, num_negatives=4, seed=1, micro_batch_index=index, segment_BL=segment_BL)
    contrastive = token_contrastive_loss(
        hidden_TD.view(3, 12, -1), embedding_TD.view(3, 12, -1), *pairs, temperature=0.1
    )
    assert losses.mlm == mlm
    assert losses.contrastive == contrastive
    assert losses.total == mlm + 0.5 * contrastive
    assert (losses.num_correct, losses.num_labels) == (num_correct, num_labels)
    assert losses.total.requires_grad
    assert losses.mlm.requires_grad
    assert not losses.contrastive.requires_grad


def test_the_parameters_are_those_of_bert() -> None:
    assert _model().state_dict().keys() == super(BertForPretraining, _model()).state_dict().keys()
    assert all(name.startswith(("tied_modules.", "1.", "2.", "3.", "4.", "6.")) for name in _model().state_dict())


def test_weight_zero_draws_no_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("pretrain.model.pretraining.sample_pairs", refuse)
    losses = _model(contrastive_weight=0.0)(*_micro_batch())
    assert losses.total == losses.mlm
    assert losses.contrastive == 0
    assert losses.total.requires_grad


@pytest.mark.fault("degenerate-batch")
def test_one_row_is_refused_only_where_there_is_a_contrast() -> None:
    one_row = _micro_batch((12,))
    one_row = (*one_row[:3], one_row[3] % 12, *one_row[4:])
    with pytest.raises(ConfigError, match="micro_batch_size"):
        _model()(*one_row)
    assert _model(contrastive_weight=0.0)(*one_row).num_labels == 3


def test_anchors_follow_the_masked_positions() -> None:
    *_, index_M, label_M, _ = arguments = _micro_batch()
    valid_BL = arguments[2]
    masked_BL = torch.zeros(3, 12, dtype=torch.bool)
    masked_BL[0, 2] = masked_BL[0, 7] = masked_BL[1, 2] = True
    expected = {"all": valid_BL, "masked": masked_BL, "unmasked": valid_BL & ~masked_BL}
    for anchors, anchor_BL in expected.items():
        assert torch.equal(_model(anchors=anchors).head._anchors(valid_BL, index_M, label_M), anchor_BL)
    # Token 0, where the unused places point, is an anchor again as soon as one place really means it.
    index_M, label_M = torch.tensor([0, 0, 0]), torch.tensor([-100, 9, -100])
    assert _model(anchors="masked").head._anchors(valid_BL, index_M, label_M).nonzero().tolist() == [[0, 0]]


def test_pairs_change_with_the_micro_batch_and_the_seed_only() -> None:
    *batch, index = _micro_batch()
    model, other = _model(), _model()
    other.head = replace(other.head, seed=2)
    same, later = model(*batch, index).contrastive, model(*batch, index + 1).contrastive
    assert model(*batch, index).contrastive == same
    assert later != same
    assert other(*batch, index).contrastive != same


@pytest.mark.fault("degenerate-batch")
def test_nothing_valid_and_nothing_masked_costs_nothing() -> None:
    ids_BL, segment_BL, valid_BL, index_M, label_M, index = _micro_batch((12, 0, 0))
    losses = _model()(ids_BL, segment_BL * 0, valid_BL & False, index_M, label_M * 0 - 100, index)
    losses.total.backward()
    assert losses.total == 0
    alone = _model()(ids_BL, segment_BL, valid_BL, index_M, label_M, index)  # one row with tokens: no negatives
    assert alone.contrastive == 0
    assert torch.isfinite(alone.total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns(dtype: torch.dtype) -> None:
    model, arguments = _model().to(dtype), _micro_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = model(*arguments)
    assert first.total.dtype == torch.float32
    for _ in range(30):
        optimizer.zero_grad()
        model(*arguments).total.backward()
        optimizer.step()
    last = model(*arguments)
    assert last.mlm < 0.3 * first.mlm
    assert last.contrastive < 0.9 * first.contrastive


def _train_with_deepspeed(stage: int) -> list[float]:
    """Losses of four steps in this process under ZeRO."""
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    torch.manual_seed(0)
    model = _model()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        config={
            "train_micro_batch_size_per_gpu": 3,
            "gradient_clipping": 0.5,
            "steps_per_print": 10**9,
            # The default keeps parameters this small whole: then nothing would be gathered and nothing tested.
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        },
    )
    losses = []
    for _ in range(4):
        total = engine(*_micro_batch()).total
        engine.backward(total)
        engine.step()
        losses.append(float(total.detach()))
    return losses


@pytest.mark.parametrize(("stage", "world_size"), [(3, 1), (3, 2)])
def test_zero_3_gathers_the_tied_word_matrix(stage: int, world_size: int) -> None:
    from forked import run_ranks

    model, expected = _model(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        total = model(*_micro_batch()).total
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        expected.append(float(total.detach()))
    for losses in run_ranks(world_size, _train_with_deepspeed, stage):
        assert losses == pytest.approx(expected, abs=1e-5)
