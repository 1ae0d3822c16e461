"""Operations of a step: against a count by hand, and against what torch counts on the real model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from pretrain.bench.step_contenders import random_batch
from pretrain.config.sections import RunConfig
from pretrain.model.build import build_model
from pretrain.parallel.mesh import Mesh
from pretrain.planner.flops import TokenCounts, add_counts, count_rows, full_rows, model_flops, step_flops

VOCAB_SIZE = 100


def config_of(*, rows: int = 4, length: int = 16, layers: int = 2, **train: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"output_dir": "unused", "device": "cpu"},
            "data": {"train": ["unused"], "seq_length": length},
            "model": {
                "num_layers": layers, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 128,
                "hidden_dropout": 0.0, "attention_dropout": 0.0,
            },
            "objective": {"num_negatives": 4, "contrastive_weight": 0.0},
            "train": {"micro_batch_size": rows, "global_batch_size": rows, **train},
        }
    )  # fmt: skip


def test_a_count_by_hand() -> None:
    """4 rows of 16 tokens, 2 predictions each (0.15 of 14); D 64, F 128, V 100, 2 layers."""
    per_token = 2 * 64 * 3 * 64 + 2 * 64 * 64 + 2 * 64 * 128 + 2 * 128 * 64  # qkv, output, feed-forward in and out
    attention = 2 * 16 * 16 * 64 * 2  # scores and weighted sum, all heads of a row
    head = 2 * 64 * 64 + 2 * 64 * 100
    forward = 2 * (4 * 16 * per_token + 4 * attention) + 4 * 2 * head
    assert model_flops(config_of(), VOCAB_SIZE) == 3 * forward


def test_bert_large_on_rows_of_256() -> None:
    """The figure by which docs/performance.md turns seconds into operations per second."""
    model = {"num_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "ffn_hidden_size": 4096}
    config = config_of(rows=64, length=256).model_copy(update={"model": config_of().model.model_copy(update=model)})
    assert model_flops(config, 30_522) == pytest.approx(31.39e12, rel=1e-3)


def test_recomputed_layers_count_for_the_hardware_only() -> None:
    words = 128  # no unused row
    plain, half = (step_flops(config_of(recompute_layers=n), words, full_rows(config_of(), 4)) for n in (0, 1))
    assert plain.model == plain.hardware == half.model
    encoder = (plain.model - 3 * 8 * (2 * 64 * 64 + 2 * 64 * words)) / 3
    assert half.hardware == pytest.approx(plain.model + encoder / 2)


SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 2, 3, 3, 3, 0, 0]])
LABELS = np.array([7, -100, 9, 8])


@pytest.mark.parametrize(("by_document", "pairs"), [(True, 9 + 16 + 4 + 1 + 9), (False, 49 + 36)])
def test_padding_counts_for_the_hardware_where_it_is_computed(by_document: bool, pairs: int) -> None:
    counts = count_rows(SEGMENTS, LABELS, by_document=by_document)
    assert counts == TokenCounts(13, pairs, 3, 13, 4)
    in_stages = count_rows(SEGMENTS, LABELS, by_document=by_document, computes_padding=True)
    assert in_stages == TokenCounts(13, pairs, 3, 16, 4)
    without, within = (step_flops(config_of(), VOCAB_SIZE, one) for one in (counts, in_stages))
    assert without.model == within.model < without.hardware < within.hardware
    assert add_counts([counts, counts]) == TokenCounts(26, 2 * pairs, 6, 26, 8)


def test_neighbouring_rows_with_documents_of_one_number_are_two() -> None:
    rows = np.ones((3, 8), np.int64)
    assert count_rows(rows, LABELS, by_document=True).pairs == count_rows(rows, LABELS, by_document=False).pairs == 192
    assert count_rows(np.zeros((2, 8), np.int64), LABELS, by_document=True).pairs == 0


@pytest.mark.parametrize("recompute_layers", [0, 2])
def test_torch_counts_the_same_on_the_real_model(recompute_layers: int) -> None:
    """Without attention's own products, the batched ones, some of which are computed twice; see the next test."""
    config = config_of(recompute_layers=recompute_layers, kernels="torch")
    model = build_model(config, VOCAB_SIZE, Mesh(dp_rank=0, dp_size=1)).train()
    batch = random_batch(config, 0, VOCAB_SIZE)
    arrays = (batch.input_ids_BL, batch.segment_BL, batch.valid_BL, batch.masked_index_M, batch.masked_label_M)
    with FlopCounterMode(display=False) as counter:
        model(*map(torch.from_numpy, arrays), 0).total.backward()
    found = {name: count for name, count in counter.get_flop_counts()["Global"].items() if name != torch.ops.aten.bmm}
    counts = replace(full_rows(config, 4), pairs=0)
    assert sum(found.values()) == pytest.approx(step_flops(config, VOCAB_SIZE, counts).hardware, rel=1e-9), found


def test_torch_counts_the_same_for_attention() -> None:
    """4 rows of 16 tokens, 4 heads of 16 features, as plain products: two layers make twice as many."""
    query, key, value = (torch.randn(4, 4, 16, 16, requires_grad=True) for _ in range(3))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        scaled_dot_product_attention(query, key, value).sum().backward()
    counts = full_rows(config_of(), 4)
    ours = [step_flops(config_of(), VOCAB_SIZE, one).model for one in (counts, replace(counts, pairs=0))]
    assert 2 * counter.get_total_flops() == pytest.approx(ours[0] - ours[1])
