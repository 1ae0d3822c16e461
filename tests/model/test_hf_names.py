"""Names of wrapped models are read exactly, and encoder layers are counted."""

from __future__ import annotations

import pytest
import torch
from hf_models import hf_model, section
from torch import Tensor

from pretrain.errors import DataError
from pretrain.model.hf import from_hf_state_dict
from pretrain.model.hf_names import name_tensors

CONFIG = section()
STATE = hf_model(CONFIG).state_dict()
ENCODER = {name.removeprefix("bert."): tensor for name, tensor in STATE.items() if name.startswith("bert.")}
HEAD = {name: tensor for name, tensor in STATE.items() if name.startswith("cls.")}


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "state",
    [
        prefixed("module.", STATE),
        prefixed("model.", STATE),
        prefixed("_orig_mod.module.", STATE),
        prefixed("module.model.bert.", STATE),
        prefixed("lightning.net.", STATE),
        {name.replace("layer.", "layer._orig_mod.").replace("bert.", "bert.module."): t for name, t in STATE.items()},
        {name.replace("layer.1.", "layer.1._fsdp_wrapped_module."): t for name, t in STATE.items()},
        ENCODER | HEAD,
        prefixed("module.", ENCODER | HEAD),
        prefixed("backbone.", ENCODER) | HEAD,
        {name.replace("Norm.weight", "Norm.gamma"): t for name, t in prefixed("module.", STATE).items()},
    ],
    ids=lambda state: next(iter(state)),
)
def test_a_wrapped_model_is_the_same_model(state: dict[str, Tensor]) -> None:
    weights = from_hf_state_dict(state, CONFIG)
    assert weights.missing == weights.unused == ()
    expected = from_hf_state_dict(STATE, CONFIG).state
    assert weights.state.keys() == expected.keys()
    assert all(torch.equal(weights.state[name], expected[name]) for name in expected)


def test_a_renamed_tensor_is_shown_and_usual_names_are_not() -> None:
    assert name_tensors(STATE).example is None
    assert name_tensors({name.replace("Norm.weight", "Norm.gamma"): t for name, t in STATE.items()}).example is None
    example = name_tensors(prefixed("module.", STATE)).example
    assert example is not None
    assert example[0] == f"module.{example[1]}"


def test_what_stands_outside_the_model_keeps_its_name() -> None:
    state = prefixed("model.", STATE) | {"model.classifier.weight": torch.ones(2), "loss.scale": torch.ones(())}
    assert set(from_hf_state_dict(state, CONFIG).unused) == {"classifier.weight", "loss.scale"}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({}, "holds no tensors"),
        (
            {"transformer.wte.weight": torch.ones(1)},
            r"holds no BERT: none of its 1 tensors is .* \(transformer.wte.weight\)",
        ),
        (prefixed("teacher.", STATE) | prefixed("student.", STATE), "holds 2 models .student.bert.embeddings, teacher"),
        (
            STATE | {"module.bert.pooler.dense.bias": torch.ones(1), "bert.pooler.dense.bias": torch.ones(1)},
            "both mean",
        ),
        (STATE | {"bert.encoder.layer.0.adapter.weight": torch.ones(1)}, r"belong to no BERT \(1\): .*adapter"),
        (
            STATE | {"bert.encoder.layer.1.attention.self.distance_embedding.weight": torch.ones(1)},
            "distance_embedding",
        ),
        (STATE | {"cls.predictions.transform.scale": torch.ones(1)}, "belong to no BERT"),
    ],
    ids=["nothing", "another", "two", "twice", "adapter", "relative", "head"],
)
def test_what_is_not_one_bert_is_refused(state: dict[str, Tensor], words: str) -> None:
    with pytest.raises(DataError, match=words):
        from_hf_state_dict(state, CONFIG)


@pytest.mark.parametrize(
    ("num_layers", "left_out", "words"),
    [
        (1, (), "config.json says num_hidden_layers 1, the weights have 2 encoder layers"),
        (3, (), "config.json says num_hidden_layers 3, the weights have 2 encoder layers"),
        (2, (0, 1), "config.json says num_hidden_layers 2, the weights have 0 encoder layers"),
        (2, (0,), "weights of encoder layer 0 are missing, those of layer 1 are there"),
    ],
)
def test_layers_are_counted(num_layers: int, left_out: tuple[int, ...], words: str) -> None:
    gone = tuple(f"bert.encoder.layer.{number}." for number in left_out)
    state = {name: tensor for name, tensor in STATE.items() if not (gone and name.startswith(gone))}
    with pytest.raises(DataError, match=words):
        from_hf_state_dict(state, section(num_layers=num_layers))


@pytest.mark.parametrize(
    "name", ["bert.embeddings.token_type_embeddings.weight", "bert.encoder.layer.1.output.dense.bias"]
)
def test_a_missing_part_of_the_encoder_is_named(name: str) -> None:
    with pytest.raises(DataError, match=rf"missing \(1\): {name}"):
        from_hf_state_dict({other: tensor for other, tensor in STATE.items() if other != name}, CONFIG)


def test_parts_under_names_of_their_own_are_shown() -> None:
    state = {name.replace("intermediate.dense.", "intermediate.dense_act."): tensor for name, tensor in STATE.items()}
    with pytest.raises(
        DataError, match=r"missing \(4\): .*intermediate.dense.bias.*, while no BERT has \(4\) .*dense_act"
    ):
        from_hf_state_dict(state, CONFIG)


def test_the_decoder_stands_in_for_the_word_embeddings() -> None:
    word = "bert.embeddings.word_embeddings.weight"
    weights = from_hf_state_dict({name: tensor for name, tensor in STATE.items() if name != word}, CONFIG)
    assert torch.equal(weights.state["tied_modules.word.weight"], STATE[word])
