"""Hugging Face names both ways: our parameters <-> `BertForMaskedLM`, our model section <-> its config.json.

Pure functions of dictionaries: no transformers, no files. Both directions are exact. The one change of layout is the
attention projection: ours is one matrix ordered (head, q | k | v, feature), theirs three.

Shape letters: H heads, d features of one head, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from pretrain.config.sections import ModelSection
from pretrain.errors import DataError
from pretrain.model.hf_names import check_layers, listing, name_tensors

WORD = "tied_modules.word.weight"
_POSITION = "1.position.weight"
_HF_WORD = "bert.embeddings.word_embeddings.weight"
_HF_DECODER = "cls.predictions.decoder."
_HF_BIAS = "cls.predictions.bias"
# Buffers that some versions of transformers add to a file; nothing is lost without them.
_HARMLESS = ("bert.embeddings.position_ids", "bert.embeddings.token_type_ids")
# Tensors that have one row per word.
HF_WORD_TABLES = (_HF_WORD, _HF_DECODER + "weight", _HF_DECODER + "bias", _HF_BIAS)
# What stands behind these names changes the output of the encoder or of the head.
_COMPUTED = ("bert.embeddings.", "bert.encoder.", "cls.predictions.")


@dataclass(frozen=True)
class HfWeights:
    """A Hugging Face state dict under our names, and the names without a counterpart."""

    state: dict[str, Tensor]
    missing: tuple[str, ...]
    """Our parameters of the head that the file lacks (a model saved without it)."""
    unused: tuple[str, ...]
    """Their tensors that BERT pretraining does not use (pooler, classifiers)."""


# -- weights -----------------------------------------------------------------------------------------------------------


def to_hf_state_dict(state: Mapping[str, Tensor], config: ModelSection) -> dict[str, Tensor]:
    """Full weights under the names of `BertForMaskedLM`; the decoder's entries are the tensors that it is tied to.

    Raises:
        DataError: a parameter is missing.
    """
    missing = [name for name in _our_names(config) if name not in state]
    if missing:
        raise DataError(f"weights: {listing(missing)} missing; is this a checkpoint of {config.num_layers} layers?")
    converted = {theirs: state[ours] for ours, theirs in _plain_pairs(config)}
    for ours, theirs in _qkv_pairs(config):
        parts = _split_qkv(state[ours], config)
        converted.update(zip(theirs, parts, strict=True))
    converted[_HF_DECODER + "weight"] = converted[_HF_WORD]
    converted[_HF_DECODER + "bias"] = converted[_HF_BIAS]
    return converted


def from_hf_state_dict(state: Mapping[str, Tensor], config: ModelSection) -> HfWeights:
    """The weights of a `BertForMaskedLM`, `BertForPreTraining` or bare `BertModel` under our names.

    The names may be those of a wrapped model (`name_tensors`).

    Raises:
        DataError: the encoder is not the whole of the one that `config` describes, a shape differs, there are tensors
            that BERT's encoder or head does not have, or the decoder is not tied to the word embeddings.
    """
    theirs = name_tensors(state).tensors
    check_layers(theirs, config.num_layers)
    _check_tied(theirs)
    for name, stand_in in ((_HF_WORD, _HF_DECODER + "weight"), (_HF_BIAS, _HF_DECODER + "bias")):
        if name not in theirs and stand_in in theirs:
            theirs[name] = theirs[stand_in]
    known = used_hf_names(config)
    _check_whole(theirs, known)
    ours = {our: theirs[their] for our, their in _plain_pairs(config) if their in theirs}
    _check_shapes(theirs, config)
    ours |= {our: _join_qkv([theirs[name] for name in names], config) for our, names in _qkv_pairs(config)}
    return HfWeights(
        state=ours,
        missing=tuple(name for name in _our_names(config) if name not in ours),
        unused=tuple(name for name in theirs if name not in known and name not in _HARMLESS),
    )


def used_hf_names(config: ModelSection) -> set[str]:
    """The names in a `BertForMaskedLM` of all tensors that become weights of ours."""
    names = {their for _, their in _plain_pairs(config)} | {n for _, names in _qkv_pairs(config) for n in names}
    return names | set(HF_WORD_TABLES)


def hf_name(name: str, config: ModelSection) -> str:
    """What one of our parameters, other than an attention projection, is called in a `BertForMaskedLM`."""
    return dict(_plain_pairs(config))[name]


def first_positions(
    state: Mapping[str, Tensor], config: ModelSection, count: int
) -> tuple[dict[str, Tensor], ModelSection]:
    """The weights and the model section with only the first `count` position embeddings (at most all of them)."""
    cut = dict(state)
    cut[_POSITION] = state[_POSITION][:count].contiguous()
    return cut, config.model_copy(update={"max_position_embeddings": cut[_POSITION].shape[0]})


def _split_qkv(tensor: Tensor, config: ModelSection) -> list[Tensor]:
    """Split [H * 3 * d, ...] in our order into query, key, value of [D, ...]."""
    by_head = tensor.reshape(config.num_attention_heads, 3, config.head_size, *tensor.shape[1:])
    return [by_head[:, part].reshape(config.hidden_size, *tensor.shape[1:]).contiguous() for part in range(3)]


def _join_qkv(parts: list[Tensor], config: ModelSection) -> Tensor:
    by_head = [part.reshape(config.num_attention_heads, 1, config.head_size, *part.shape[1:]) for part in parts]
    return torch.cat(by_head, dim=1).reshape(3 * config.hidden_size, *parts[0].shape[1:]).contiguous()


# -- names -------------------------------------------------------------------------------------------------------------


def _plain_pairs(config: ModelSection) -> Iterator[tuple[str, str]]:
    """(our name, their name) of every tensor that is the same in both."""
    yield WORD, _HF_WORD
    yield _POSITION, "bert.embeddings.position_embeddings.weight"
    yield "1.token_type.weight", "bert.embeddings.token_type_embeddings.weight"
    modules = [("1.norm", "bert.embeddings.LayerNorm")]
    for index in range(config.num_layers):
        ours, theirs = str(2 + index), f"bert.encoder.layer.{index}"
        modules += [
            (f"{ours}.attention_out", f"{theirs}.attention.output.dense"),
            (f"{ours}.attention_norm", f"{theirs}.attention.output.LayerNorm"),
            (f"{ours}.ffn_in", f"{theirs}.intermediate.dense"),
            (f"{ours}.ffn_out", f"{theirs}.output.dense"),
            (f"{ours}.ffn_norm", f"{theirs}.output.LayerNorm"),
        ]
    head = str(config.num_layers + 2)
    modules += [(f"{head}.dense", "cls.predictions.transform.dense")]
    modules += [(f"{head}.norm", "cls.predictions.transform.LayerNorm")]
    for our_module, their_module in modules:
        for suffix in ("weight", "bias"):
            yield f"{our_module}.{suffix}", f"{their_module}.{suffix}"
    yield f"{config.num_layers + 4}.bias", _HF_BIAS


def _qkv_pairs(config: ModelSection) -> Iterator[tuple[str, list[str]]]:
    """(our name, their query, key and value) of every attention projection."""
    for index in range(config.num_layers):
        for suffix in ("weight", "bias"):
            prefix = f"bert.encoder.layer.{index}.attention.self"
            yield f"{2 + index}.qkv.{suffix}", [f"{prefix}.{part}.{suffix}" for part in ("query", "key", "value")]


def _all_pairs(config: ModelSection) -> Iterator[tuple[str, str]]:
    """(our name, their name) of every tensor of theirs."""
    yield from _plain_pairs(config)
    yield from ((our, their) for our, names in _qkv_pairs(config) for their in names)


def _our_names(config: ModelSection) -> list[str]:
    return [our for our, _ in _plain_pairs(config)] + [our for our, _ in _qkv_pairs(config)]


# -- checks ------------------------------------------------------------------------------------------------------------


def _check_tied(theirs: Mapping[str, Tensor]) -> None:
    for tied, origin in ((_HF_DECODER + "weight", _HF_WORD), (_HF_DECODER + "bias", _HF_BIAS)):
        if tied in theirs and origin in theirs and not torch.equal(theirs[tied], theirs[origin]):
            raise DataError(f"{tied} differs from {origin}; only a tied decoder can be imported")


def _check_whole(theirs: Mapping[str, Tensor], known: set[str]) -> None:
    """Everything but the head must be there, and nothing may be there that BERT does not compute with."""
    missing = sorted(name for name in known if name.startswith("bert.") and name not in theirs)
    foreign = [name for name in theirs if name.startswith(_COMPUTED) and name not in known and name not in _HARMLESS]
    if missing:
        instead = f", while no BERT has ({len(foreign)}) {listing(foreign)}" if foreign else ""
        raise DataError(
            f"tensors of the embeddings and encoder layers are missing ({len(missing)}): {listing(missing)}{instead}; "
            "only a head can be drawn anew, so save the whole model, or the tensors under transformers' names"
        )
    if foreign:
        raise DataError(
            f"tensors that belong to no BERT ({len(foreign)}): {listing(foreign)}; adapters have to be merged into the "
            "weights before, another architecture cannot be imported"
        )


def _check_shapes(theirs: Mapping[str, Tensor], config: ModelSection) -> None:
    num_words = next(iter(theirs[_HF_WORD].shape), 0)
    problems = []
    for our, their in _all_pairs(config):
        if their not in theirs:
            continue
        shape = full_shape(our, config, vocab_size=num_words)
        # The three projections have equal shares of ours.
        expected = (shape[0] // 3, *shape[1:]) if ".qkv." in our else shape
        if tuple(theirs[their].shape) != expected:
            problems.append(f"{their} has {list(theirs[their].shape)}, expected {list(expected)}")
    if problems:
        raise DataError(
            f"tensors that do not fit config.json ({len(problems)}): {listing(problems)}; take the config.json that "
            "was saved with these weights"
        )


def full_shape(name: str, config: ModelSection, *, vocab_size: int) -> tuple[int, ...]:
    """The full shape of one of our parameters."""
    size, inner = config.hidden_size, config.ffn_hidden_size
    layer, _, parameter = name.partition(".")
    if name == WORD:
        return (vocab_size, size)
    if layer == str(config.num_layers + 4):
        return (vocab_size,)
    matrices: dict[str, tuple[int, int]] = {
        "position.weight": (config.max_position_embeddings, size),
        "token_type.weight": (config.type_vocab_size, size),
        "qkv.weight": (3 * size, size),
        "attention_out.weight": (size, size),
        "ffn_in.weight": (inner, size),
        "ffn_out.weight": (size, inner),
        "dense.weight": (size, size),
    }
    vectors = {"qkv.bias": (3 * size,), "ffn_in.bias": (inner,)}
    return matrices.get(parameter) or vectors.get(parameter) or (size,)


# -- configuration -----------------------------------------------------------------------------------------------------


_SAME_MEANING = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "max_position_embeddings": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
    "layer_norm_eps": "layer_norm_eps",
    "initializer_range": "initializer_range",
}


def hf_config(config: ModelSection, vocab_size: int, *, pad_token_id: int = 0) -> dict[str, Any]:
    """The contents of config.json from which `AutoModelForMaskedLM` rebuilds this model."""
    values = config.model_dump()
    return {
        "architectures": ["BertForMaskedLM"],
        "model_type": "bert",
        "vocab_size": vocab_size,
        **{theirs: values[ours] for ours, theirs in _SAME_MEANING.items()},
        "hidden_act": "gelu",
        "pad_token_id": pad_token_id,
        "tie_word_embeddings": True,
    }


def model_section_from_hf(hf: Mapping[str, Any]) -> ModelSection:
    """The model section that a Hugging Face BERT's config.json describes; missing values get BERT's defaults.

    Raises:
        DataError: it describes another kind of model, or a setting changes what the layers compute.
    """
    supported: dict[str, tuple[tuple[Any, ...], str]] = {
        "model_type": (("bert",), "another architecture"),
        "hidden_act": (("gelu", "gelu_python"), "another activation"),  # both names of the exact GELU
        "position_embedding_type": (("absolute",), "relative positions"),
        "tie_word_embeddings": ((True,), "an untied decoder"),
        "is_decoder": ((False,), "causal attention"),
        "add_cross_attention": ((False,), "cross-attention"),
        "pruned_heads": (({},), "heads taken out"),
        "quantization_config": ((), "quantised weights"),
    }
    problems = [
        f"{key} is {hf[key]!r} ({meaning}), only {' or '.join(map(repr, values)) or 'none'} is supported"
        for key, (values, meaning) in supported.items()
        if hf.get(key) is not None and hf[key] not in values
    ]
    if problems:
        raise DataError(f"config.json describes a model that post-LN BERT cannot express: {listing(problems)}")
    values = {ours: hf[theirs] for ours, theirs in _SAME_MEANING.items() if hf.get(theirs) is not None}
    try:
        section = ModelSection(**values)
    except ValidationError as error:
        wrong = [f"{_SAME_MEANING[str(e['loc'][0])]} is {e['input']!r}: {e['msg']}" for e in error.errors()]
        raise DataError(f"config.json cannot be the one of a BERT: {listing(wrong)}") from None
    if section.hidden_size % section.num_attention_heads:
        raise DataError(
            f"config.json: hidden_size ({section.hidden_size}) must be a multiple of num_attention_heads "
            f"({section.num_attention_heads})"
        )
    return section
