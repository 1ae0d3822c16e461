"""Our forward and backward pass against transformers' `BertForMaskedLM`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_models import VOCAB_SIZE, hf_model, our_model, rows, section
from torch.testing import assert_close

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}

SHAPES: list[dict[str, Any]] = [
    {},
    {"num_layers": 1, "hidden_size": 24, "num_attention_heads": 1, "ffn_hidden_size": 7},
    {"num_layers": 3, "hidden_size": 40, "num_attention_heads": 8, "layer_norm_eps": 1e-5},
    {"hidden_size": 15, "num_attention_heads": 5, "ffn_hidden_size": 64, "type_vocab_size": 3},
    {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 100},
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", [[20, 20, 20], [20, 1, 7]])
def test_logits_hidden_states_and_embeddings(shape: dict[str, Any], lengths: list[int]) -> None:
    config = section(**shape)
    hf = hf_model(config, seed=len(shape))
    model = our_model(hf, config, has_padding=min(lengths) < 20)
    ids_BL, segment_BL = rows(lengths, 20)
    token_type_BL = torch.randint(0, config.type_vocab_size, ids_BL.shape)
    with torch.no_grad():
        expected = hf(ids_BL, attention_mask=segment_BL, token_type_ids=token_type_BL, output_hidden_states=True)
        hidden_TD, embedding_TD = model.encode(ids_BL, segment_BL, token_type_BL)
        logits_BLV = model.logits(ids_BL, segment_BL, token_type_BL)
    is_token = segment_BL.bool()
    assert_close(embedding_TD.view(*ids_BL.shape, -1)[is_token], expected.hidden_states[0][is_token], **TOLERANCE)
    assert_close(hidden_TD.view(*ids_BL.shape, -1)[is_token], expected.hidden_states[-1][is_token], **TOLERANCE)
    assert_close(logits_BLV[is_token], expected.logits[is_token], **TOLERANCE)


def test_left_out_token_types_are_zero() -> None:
    config = section()
    hf = hf_model(config)
    ids_BL, segment_BL = rows([9, 9], 9)
    with torch.no_grad():
        assert_close(our_model(hf, config).logits(ids_BL, segment_BL), hf(ids_BL).logits, **TOLERANCE)


def test_prediction_equals_the_logits_of_those_positions() -> None:
    config = section()
    model = our_model(hf_model(config), config)
    ids_BL, segment_BL = rows([9, 6], 9)
    index_M = torch.tensor([3, 10, 0, 3])
    with torch.no_grad():
        hidden_TD, _ = model.encode(ids_BL, segment_BL)
        expected = model.logits(ids_BL, segment_BL).flatten(0, 1)[index_M]
        assert_close(model.predict(hidden_TD, index_M), expected, **TOLERANCE)


def test_gradients_equal_those_of_transformers() -> None:
    config = section()
    hf = hf_model(config)
    model = our_model(hf, config)
    ids_BL, segment_BL = rows([12, 12], 12, seed=3)
    ids_BL[ids_BL == 0] = 1  # transformers gives its padding word no gradient
    index_M, label_M = torch.tensor([2, 5, 17]), torch.tensor([4, 8, 15])
    hidden_TD, _ = model.encode(ids_BL, segment_BL)
    torch.nn.functional.cross_entropy(model.predict(hidden_TD, index_M), label_M).backward()
    labels = torch.full((24,), -100)
    labels[index_M] = label_M
    hf(ids_BL, attention_mask=segment_BL, labels=labels.view(2, 12)).loss.backward()
    parts = (hf.bert.encoder.layer[0].attention.self, hf.bert.encoder.layer[1].output.dense)
    qkv = model.get_submodule("2.qkv").weight.grad.view(4, 3, 8, 32)  # type: ignore[union-attr,operator]
    assert_close(qkv[:, 1].reshape(32, 32), parts[0].key.weight.grad, **TOLERANCE)
    assert_close(model.get_submodule("3.ffn_out").weight.grad, parts[1].weight.grad, **TOLERANCE)
    words = model.tied_modules["word"].weight.grad
    assert_close(words[:VOCAB_SIZE], hf.get_input_embeddings().weight.grad, **TOLERANCE)
    assert not words[VOCAB_SIZE:].any()


def test_documents_of_one_row_see_only_themselves() -> None:
    config = section()
    hf = hf_model(config)
    model = our_model(hf, config, separate_documents=True)
    ids_BL, _ = rows([12, 12], 12)
    segment_BL = torch.tensor([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12])
    with torch.no_grad():
        hidden_BLD = model.encode(ids_BL, segment_BL)[0].view(2, 12, -1)
        for columns in (slice(0, 5), slice(5, 9)):
            # transformers sees the document alone, from position 0 on.
            alone = hf.bert(ids_BL[:1, columns]).last_hidden_state
            assert_close(hidden_BLD[:1, columns], alone, **TOLERANCE)
        whole = hf.bert(ids_BL[1:]).last_hidden_state
        assert_close(hidden_BLD[1:], whole, **TOLERANCE)


@pytest.mark.fault("degenerate-batch")
@pytest.mark.parametrize("separate_documents", [False, True])
def test_a_row_of_padding_stays_finite(separate_documents: bool) -> None:
    config = section()
    model = our_model(hf_model(config), config, separate_documents=separate_documents)
    ids_BL, segment_BL = rows([6, 0], 6)
    hidden_TD, _ = model.encode(ids_BL, segment_BL)
    hidden_TD.sum().backward()
    assert torch.isfinite(hidden_TD).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_bf16_weights_give_nearly_the_same() -> None:
    config = section()
    hf = hf_model(config)
    ids_BL, segment_BL = rows([20, 11], 20)
    with torch.no_grad():
        expected = our_model(hf, config).logits(ids_BL, segment_BL)
        half = our_model(hf, config).bfloat16().logits(ids_BL, segment_BL)
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected)[segment_BL.bool()].abs().mean() < 0.03 * expected.abs().mean()
    assert half.shape == (2, 20, VOCAB_SIZE)
