"""Random tiny Hugging Face models with nothing left at its trivial value, and ours with the same weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from pretrain.config.sections import ModelSection
from pretrain.model.bert import Bert
from pretrain.model.hf import from_hf_state_dict, hf_config
from pretrain.model.layer_spec import plain_layers

VOCAB_SIZE = 61


def section(**changes: Any) -> ModelSection:
    """A model of two layers, 32 features and 4 heads, without dropout."""
    defaults = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 48,
        "max_position_embeddings": 24,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return ModelSection(**{**defaults, **changes})


def hf_model(config: ModelSection, *, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> BertForMaskedLM:
    """transformers' model with random biases and LayerNorm weights, in evaluation mode."""
    model = BertForMaskedLM(BertConfig(**hf_config(config, vocab_size))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def our_model(hf: BertForMaskedLM, config: ModelSection, *, vocab_size: int = VOCAB_SIZE, **options: bool) -> Bert:
    """Ours with the weights of `hf`, in evaluation mode."""
    model = Bert(config, vocab_size, plain_layers(), **options).eval()
    model.load_state_dict(from_hf_state_dict(hf.state_dict(), config).state, strict=True)
    return model


def rows(lengths: list[int], length: int, *, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random ids and segments (1, 0 behind each row's length), [B, L]."""
    generator = torch.Generator().manual_seed(seed)
    ids_BL = torch.randint(0, vocab_size, (len(lengths), length), generator=generator)
    segment_BL = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    return ids_BL, segment_BL
