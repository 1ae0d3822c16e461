"""Which implementation of attention a run uses, and why another one that was asked for cannot be used.

All of them compute the same; what differs is speed, and what they can do:

    torch       on a CPU our attention by document; on a GPU scaled_dot_product_attention, whose fast kernels take rows
                without padding only: for other rows it needs a mask
    varlen      torch.nn.attention.varlen: documents of any length, 16 bits, no dropout
    triton      our kernel: documents of any length, and the very dropout of a CPU
    flash_attn  the package flash-attn, if it is installed: documents of any length, 16 bits

Nothing of the packages is imported before it is chosen.
"""

from __future__ import annotations

import importlib.util
from typing import Literal, NamedTuple

import torch

from pretrain.errors import ConfigError
from pretrain.kernels.choice import Kernels, triton_problem

Attention = Literal["torch", "varlen", "triton", "flash_attn"]
WantedAttention = Literal["auto", "torch", "varlen", "triton", "flash_attn"]

ATTENTION_BLOCK = 64
"""Tokens of a document whose attention one program of our Triton kernel computes."""
_LARGEST_HEAD = {"triton": 128, "varlen": 256, "flash_attn": 256}
_VARLEN, _FLASH_ATTN = "torch.nn.attention.varlen", "flash_attn"


class AttentionNeeds(NamedTuple):
    """What a run asks of its attention."""

    device: torch.device
    precision: Literal["fp32", "bf16", "fp16"]
    dropout: float
    head_size: int
    has_documents: bool
    """Rows hold padding, or several documents that do not see each other."""


def choose_attention(wanted: WantedAttention, kernels: Kernels, needs: AttentionNeeds) -> Attention:
    """What `train.attention` means for a run; `auto` takes the fastest, and `kernels` whether it may be our own.

    Raises:
        ConfigError: what was asked for cannot compute what the run needs.
    """
    if wanted == "auto":
        return _fastest(kernels, needs)
    if wanted != "torch":
        problem = _problem(wanted, needs)
        if problem is not None:
            raise ConfigError(f"train.attention={wanted}: {problem}; set train.attention=auto")
    return wanted


def _fastest(kernels: Kernels, needs: AttentionNeeds) -> Attention:
    if needs.device.type == "cpu" or not needs.has_documents:
        return "torch"
    candidates: tuple[Attention, ...] = ("varlen", "triton", "flash_attn")
    for candidate in candidates:
        if _problem(candidate, needs) is None and (candidate != "triton" or kernels == "triton"):
            return candidate
    return "torch"


def _problem(attention: Attention, needs: AttentionNeeds) -> str | None:
    """Why an attention cannot be used; None if it can."""
    if needs.head_size > _LARGEST_HEAD[attention]:
        return (
            f"its heads have at most {_LARGEST_HEAD[attention]} features, and these have {needs.head_size} "
            "(model.hidden_size / model.num_attention_heads)"
        )
    if attention == "triton":
        return triton_problem(needs.device)
    if needs.device.type == "cpu":
        return "there is no GPU"
    if needs.precision == "fp32":
        return "it computes in 16 bits, and precision is fp32"
    if needs.head_size % 8:
        return f"its heads have a multiple of 8 features, and these have {needs.head_size}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(needs.device) < (8, 0):
        return f"it needs an Ampere GPU or a later one, and this is {torch.cuda.get_device_name(needs.device)}"
    if attention == "varlen":
        if needs.dropout > 0:
            return f"it has no dropout, and model.attention_dropout is {needs.dropout:g}"
        return None if _exists(_VARLEN) else f"torch {torch.__version__} does not have it"
    return None if _exists(_FLASH_ATTN) else "the package flash-attn is not installed"


def _exists(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
