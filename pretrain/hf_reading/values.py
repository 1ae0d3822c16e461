"""What the tensors of a file must be to become weights: floating point, finite, one row per word of the tokenizer."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from pretrain.data.tokenizer.base import Tokenizer
from pretrain.errors import DataError
from pretrain.model.hf import HF_WORD_TABLES
from pretrain.model.hf_names import listing

# Programs pad to multiples of up to 128 for each of up to eight tensor-parallel ranks.
_MOST_PADDING = 1024
_KINDS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def as_weights(tensors: Mapping[str, Tensor], used: Collection[str]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors, those in `used` as fp32, and what has to be said about their conversion.

    Raises:
        DataError: one of `used` is empty, is not of a floating-point type that weights have, or not finite in fp32.
    """
    empty = [name for name, tensor in tensors.items() if name in used and not tensor.numel()]
    if empty:
        raise DataError(
            f"tensors without values ({len(empty)}): {listing(empty)}; they were saved under ZeRO-3 without being "
            "gathered: make the file with the checkpoint's zero_to_fp32.py"
        )
    wrong = [f"{name} is {_kind(tensor)}" for name, tensor in tensors.items() if name in used and not _is_float(tensor)]
    if wrong:
        raise DataError(
            f"tensors that cannot be weights ({len(wrong)}): {listing(wrong)}; quantised weights are not imported, "
            "save the model in fp32, bf16 or fp16"
        )
    kinds = {tensor.dtype for name, tensor in tensors.items() if name in used} - {torch.float32}
    weights = {name: tensor.to(torch.float32) if name in used else tensor for name, tensor in tensors.items()}
    broken = [text for name in weights if name in used and (text := describe_non_finite(name, weights[name]))]
    if broken:
        raise DataError(
            f"tensors that are not finite ({len(broken)}): {listing(broken)}; take a checkpoint from before that "
            "happened, or fetch the file again"
        )
    exactly = {torch.float64: "rounded to fp32", torch.float16: "exactly", torch.bfloat16: "exactly"}
    notes = [f"{str(kind).removeprefix('torch.')} is converted to fp32, {exactly[kind]}" for kind in kinds]
    return weights, sorted(notes)


def describe_non_finite(name: str, tensor: Tensor) -> str | None:
    """How many values are NaN or infinite; None if none is."""
    number = tensor.numel() - int(torch.isfinite(tensor).sum())
    return f"{name}: {number:,} of {tensor.numel():,} values are NaN or infinite" if number else None


def without_padding(tensors: Mapping[str, Tensor], tokenizer: Tokenizer) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors without rows that stand for no word of the tokenizer, and what has to be said about it.

    Models are padded so that a size is a multiple of 8 or 64. Only the tokenizer knows how many of the rows are words.

    Raises:
        DataError: the tokenizer has words without a row, or is too small to be the model's.
    """
    size = tokenizer.vocab_size
    tables = {name: tensors[name] for name in HF_WORD_TABLES if name in tensors and tensors[name].dim()}
    for name, table in tables.items():
        rows = table.shape[0]
        if rows < size:
            raise DataError(
                f"{name} has {rows:,} rows, the tokenizer ({tokenizer.info.name}) {size:,} pieces: no row for "
                f"id {rows} ({tokenizer.piece(rows)!r}); take the tokenizer that the model was "
                "trained with, or resize_token_embeddings of the model and save it again"
            )
    cut = {name: table[:size].contiguous() for name, table in tables.items() if table.shape[0] > size}
    if not cut:
        return dict(tensors), []
    if (surplus := max(tables[name].shape[0] for name in cut) - size) > _MOST_PADDING:
        raise DataError(
            f"there are {surplus:,} more rows of words than the {size:,} pieces of the tokenizer "
            f"({tokenizer.info.name}), which is no padding; name the model's own tokenizer with "
            "--tokenizer, or, if the rows are of no use, resize_token_embeddings of the model and save it again"
        )
    shares = ", ".join(f"{tables[name].shape[0] - size:,} of {tables[name].shape[0]:,} of {name}" for name in cut)
    return {**tensors, **cut}, [f"padding rows left out, since the tokenizer has {size:,} pieces: {shares}"]


def _is_float(tensor: Tensor) -> bool:
    return tensor.dtype in _KINDS and tensor.layout == torch.strided and not tensor.is_quantized


def _kind(tensor: Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    return kind if tensor.layout == torch.strided else f"{kind}, sparse"
