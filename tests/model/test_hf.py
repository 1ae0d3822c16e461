"""Names both ways: exact round trips, and refusals that say why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_models import VOCAB_SIZE, hf_model, section
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel

from pretrain.errors import DataError
from pretrain.model.bert import Bert
from pretrain.model.hf import from_hf_state_dict, hf_config, model_section_from_hf, to_hf_state_dict
from pretrain.model.layer_spec import plain_layers

CONFIG = section(num_layers=3)


def _assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_round_trip_from_theirs_is_exact() -> None:
    theirs = hf_model(CONFIG).state_dict()
    weights = from_hf_state_dict(theirs, CONFIG)
    assert weights.missing == weights.unused == ()
    _assert_same(to_hf_state_dict(weights.state, CONFIG), theirs)


def test_round_trip_from_ours_is_exact() -> None:
    model = Bert(CONFIG, VOCAB_SIZE, plain_layers(), seed=3)
    ours = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    weights = from_hf_state_dict(to_hf_state_dict(ours, CONFIG), CONFIG)
    _assert_same(weights.state, ours)


def test_theirs_loads_strictly_and_is_tied() -> None:
    state = to_hf_state_dict(Bert(CONFIG, VOCAB_SIZE, plain_layers()).state_dict(), CONFIG)
    assert state["cls.predictions.decoder.weight"] is state["bert.embeddings.word_embeddings.weight"]
    BertForMaskedLM(BertConfig(**hf_config(CONFIG, VOCAB_SIZE))).load_state_dict(state, strict=True)


def test_a_file_without_the_tied_entries_loads() -> None:
    theirs = hf_model(CONFIG).state_dict()
    saved = {name: tensor for name, tensor in theirs.items() if "decoder" not in name}
    weights = from_hf_state_dict(saved, CONFIG)
    assert weights.missing == ()
    _assert_same(to_hf_state_dict(weights.state, CONFIG), theirs)


def test_the_decoder_bias_stands_in_for_the_bias() -> None:
    theirs = dict(hf_model(CONFIG).state_dict())
    bias = theirs.pop("cls.predictions.bias")
    assert torch.equal(from_hf_state_dict(theirs, CONFIG).state["7.bias"], bias)


def test_pooler_and_sentence_head_are_reported_as_unused() -> None:
    state = BertForPreTraining(BertConfig(**hf_config(CONFIG, VOCAB_SIZE))).state_dict()
    weights = from_hf_state_dict(state, CONFIG)
    assert weights.missing == ()
    assert set(weights.unused) == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "cls.seq_relationship.weight",
        "cls.seq_relationship.bias",
    }


def test_a_bare_encoder_lacks_the_head() -> None:
    state = BertModel(BertConfig(**hf_config(CONFIG, VOCAB_SIZE)), add_pooling_layer=False).state_dict()
    weights = from_hf_state_dict(state, CONFIG)
    assert weights.unused == ()
    assert set(weights.missing) == {"5.dense.weight", "5.dense.bias", "5.norm.weight", "5.norm.bias", "7.bias"}


def test_names_of_the_first_releases_are_understood() -> None:
    theirs = hf_model(CONFIG).state_dict()
    old = {k.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): v for k, v in theirs.items()}
    old["bert.embeddings.position_ids"] = torch.arange(24)[None]
    weights = from_hf_state_dict(old, CONFIG)
    assert weights.unused == ()
    _assert_same(to_hf_state_dict(weights.state, CONFIG), theirs)


def test_an_untied_decoder_is_refused() -> None:
    state = dict(hf_model(CONFIG).state_dict())
    state["cls.predictions.decoder.weight"] = state["cls.predictions.decoder.weight"] + 1
    with pytest.raises(DataError, match="tied decoder"):
        from_hf_state_dict(state, CONFIG)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        (
            "bert.encoder.layer.1.intermediate.dense.weight",
            (5, 32),
            r"layer.1.intermediate.dense.weight has \[5, 32\], expected \[48, 32\]",
        ),
        (
            "bert.encoder.layer.1.attention.self.key.weight",
            (31, 32),
            r"layer.1.attention.self.key.weight has \[31, 32\], expected \[32, 32\]",
        ),
        ("bert.embeddings.position_embeddings.weight", (23, 32), "position_embeddings.weight has"),
        ("cls.predictions.bias", (60,), r"cls.predictions.bias has \[60\], expected \[61\]"),
    ],
)
def test_wrong_shapes_are_named(name: str, shape: tuple[int, ...], words: str) -> None:
    state = {k: v for k, v in hf_model(CONFIG).state_dict().items() if "decoder" not in k}
    state[name] = torch.zeros(shape)
    with pytest.raises(DataError, match=words):
        from_hf_state_dict(state, CONFIG)


def test_incomplete_projections_and_weights_are_named() -> None:
    state = dict(hf_model(CONFIG).state_dict())
    del state["bert.encoder.layer.2.attention.self.value.bias"]
    with pytest.raises(DataError, match=r"missing \(1\): bert.encoder.layer.2.attention.self.value.bias"):
        from_hf_state_dict(state, CONFIG)
    ours = Bert(CONFIG, VOCAB_SIZE, plain_layers()).state_dict()
    del ours["3.qkv.weight"]
    with pytest.raises(DataError, match="3.qkv.weight missing"):
        to_hf_state_dict(ours, CONFIG)


# -- configuration -----------------------------------------------------------------------------------------------------


def test_configuration_round_trip() -> None:
    config = section(layer_norm_eps=1e-5, hidden_dropout=0.2, initializer_range=0.03, type_vocab_size=3)
    described = hf_config(config, 99, pad_token_id=7)
    assert model_section_from_hf(described) == config
    assert model_section_from_hf(BertConfig(**described).to_dict()) == config
    assert BertConfig(**described).vocab_size == 99
    assert BertConfig(**described).pad_token_id == 7


def test_what_a_configuration_leaves_out_has_berts_default() -> None:
    assert model_section_from_hf({"model_type": "bert"}).hidden_size == BertConfig().hidden_size


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "roberta"}, "another architecture"),
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"tie_word_embeddings": False}, "untied"),
        ({"is_decoder": True}, "causal"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_attention_heads": 5}, "multiple"),
    ],
)
def test_other_models_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        model_section_from_hf({**hf_config(CONFIG, 10), **change})
