"""Folders as Hugging Face saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM


def random_bert(folder: Path, seed: int = 0, kind: Any = BertForMaskedLM, **changes: Any) -> Path:
    """Save a tiny model of random weights as a Hugging Face folder; `changes` are keys of its configuration."""
    torch.manual_seed(seed)
    shape = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = BertConfig(**{**shape, "intermediate_size": 40, "max_position_embeddings": 32, **changes})
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder
