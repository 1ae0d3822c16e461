"""The classes that the model is built from: plain torch modules, or the tensor-parallel ones of `tensor_parallel.py`.

`layers.py` asks a `LayerSpec` for its linears and embeddings; all of them map a tensor to a tensor, so the layers read
the same either way.

Column-parallel linears split their output features, row-parallel ones their input features, the word matrix and the
vocabulary bias split the words (Shoeybi et al. 2019, Megatron-LM, section 3). These two have unused rows at the end, up
to `padded_vocab_size`; their `num_words` says how many of all ranks' rows are words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.kernels.add_norm import add_norm
from pretrain.kernels.attention_choice import Attention
from pretrain.kernels.choice import Kernels
from pretrain.kernels.dropout_mask import HiddenDropout
from pretrain.objectives.mlm import VocabularyShard
from pretrain.planner.vocabulary import padded_vocab_size


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _identity_pair(hidden_TD: Tensor, embedding_TD: Tensor) -> tuple[Tensor, Tensor]:
    return hidden_TD, embedding_TD


@dataclass(frozen=True)
class LayerSpec:
    """Builders of the parts that differ between layouts, and this rank's place among the ranks that share a matrix."""

    word_embedding: Callable[[int, int], nn.Module]
    """(vocabulary size, hidden size); the module is called with ids, or with hidden states and decode=True."""
    column_linear: Callable[[int, int], nn.Module]
    row_linear: Callable[[int, int], nn.Module]
    vocabulary_parameter: Callable[[int], nn.Parameter]
    linear: Callable[[int, int], nn.Module]
    embedding: Callable[[int, int], nn.Module]
    layer_norm: Callable[[int, float], nn.Module]
    """For the embedding and the encoder, where sequence parallelism splits the tokens; the head has a `LayerNorm`."""
    scatter_tokens: Callable[[Tensor], Tensor] = _identity
    """Enters the part of the model where sequence parallelism splits the tokens, [T, D] -> [T / tp, D]."""
    gather_tokens: Callable[[Tensor], Tensor] = _identity
    """Leaves that part, [T / tp, D] -> [T, D]."""
    share_contrast: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = _identity_pair
    """Applied to h and e before a contrastive loss for which each rank computes its own anchors."""
    sum_contrast: Callable[[Tensor], Tensor] = _identity
    """Makes the loss over all anchors out of this rank's part of it."""
    tp_rank: int = 0
    tp_size: int = 1
    tensor_group: distributed.ProcessGroup | None = None
    has_split_tokens: bool = False
    """Sequence parallelism."""
    kernels: Kernels = "torch"
    """Who computes what is not a matrix product: see `kernels/choice.py`."""
    attention: Attention = "torch"
    """Who computes attention: see `kernels/attention_choice.py`."""
    recomputes_elementwise: bool = False
    """Feed-forward blocks keep their products only, and compute GELU again in backward."""

    def with_split_tokens(
        self,
        *,
        layer_norm: Callable[[int, float], nn.Module],
        scatter_tokens: Callable[[Tensor], Tensor],
        gather_tokens: Callable[[Tensor], Tensor],
    ) -> LayerSpec:
        """The same layers with sequence parallelism; `gather_tokens` splits the gradient that it gets."""
        return replace(
            self,
            layer_norm=layer_norm,
            scatter_tokens=scatter_tokens,
            gather_tokens=gather_tokens,
            share_contrast=_identity_pair,
            has_split_tokens=True,
        )

    def vocabulary_shard(self, vocab_size: int) -> VocabularyShard | None:
        """The words whose logits this rank computes; None for all of them."""
        if self.tensor_group is None:
            return None
        return VocabularyShard(
            self.tp_rank * padded_vocab_size(vocab_size, self.tp_size) // self.tp_size, self.tensor_group
        )

    def num_unused_words(self, vocab_size: int) -> int:
        """Rows at the end of this rank's part of the word matrix that stand for no word."""
        part = padded_vocab_size(vocab_size, self.tp_size) // self.tp_size
        return min(part, max(0, (self.tp_rank + 1) * part - vocab_size))

    def first_token(self, num_tokens: int) -> int:
        """The number of the first of this rank's `num_tokens` tokens: with split tokens ranks follow each other."""
        return self.tp_rank * num_tokens if self.has_split_tokens else 0

    def own_tokens(self, num_tokens: int) -> range:
        """Flat indices of the anchors that this rank computes; with split tokens those that it holds."""
        first, end = (-(-rank * num_tokens // self.tp_size) for rank in (self.tp_rank, self.tp_rank + 1))
        return range(first, end)


class HoldsWords(nn.Module):
    """A module whose only parameter has one row per word; its state dict has the words alone where it has them all."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, parameter in self.named_parameters(recurse=False):
            if _has_all_words(parameter):
                destination[prefix + name] = destination[prefix + name][: num_words_of(parameter)]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take the words alone, or the parameter as it is."""
        given = dict(state_dict)
        for name, parameter in self.named_parameters(recurse=False):
            rows = given.get(prefix + name)
            if isinstance(rows, Tensor) and _has_all_words(parameter) and len(rows) == num_words_of(parameter):
                given[prefix + name] = F.pad(rows, [0, 0] * (rows.dim() - 1) + [0, len(parameter) - len(rows)])
        super()._load_from_state_dict(given, prefix, *rest)


def _has_all_words(parameter: Tensor) -> bool:
    """False for a tensor-parallel rank's part, and for what ZeRO-3 has emptied."""
    num_words = num_words_of(parameter)
    return num_words is not None and not hasattr(parameter, "partition_dim") and len(parameter) >= num_words


def vocabulary_parameter(vocab_size: int) -> nn.Parameter:
    """One number per row of the word matrix."""
    return with_words(nn.Parameter(torch.empty(padded_vocab_size(vocab_size))), vocab_size)


def with_words(parameter: nn.Parameter, num_words: int) -> nn.Parameter:
    """The same parameter, which from now on knows how many of all ranks' rows stand for a word."""
    parameter.num_words = num_words  # type: ignore[attr-defined]
    return parameter


def num_words_of(parameter: Tensor) -> int | None:
    """How many rows of a parameter, over all tensor-parallel ranks, stand for a word; None if rows are no words."""
    num_words: int | None = getattr(parameter, "num_words", None)
    return num_words


# `reset_parameters` does nothing in these classes because `initialise.py` fills every parameter once, by name.


class Linear(nn.Linear):
    """torch's linear without its own initial values."""

    def reset_parameters(self) -> None:
        """Leave the memory unchanged."""


class Embedding(nn.Embedding):
    """torch's embedding without its own initial values."""

    def reset_parameters(self) -> None:
        """Leave the memory unchanged."""


class WordEmbedding(HoldsWords, Embedding):
    """The tied word matrix [V, D] with its unused rows, and nothing else.

    Decoding calls the same module and does not use its weight from outside: ZeRO-3 gathers a partitioned weight when
    its module is called, and a pipeline calls a tied module in two stages.
    """

    def __init__(self, vocab_size: int, size: int) -> None:
        super().__init__(padded_vocab_size(vocab_size), size)
        with_words(cast(nn.Parameter, self.weight), vocab_size)

    def forward(self, input: Tensor, decode: bool = False) -> Tensor:
        """Embeddings [..., D] of ids [...]; with `decode`, logits [M, V] of hidden states [M, D]."""
        return F.linear(input, self.weight) if decode else F.embedding(input, self.weight)


class LayerNorm(nn.LayerNorm):
    """LayerNorm of the last dimension, alone or of a residual sum."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps=eps)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        drop: HiddenDropout | None = None,
        kernels: Kernels = "torch",
    ) -> Tensor:
        """Normalised [..., D]; with a residual [N, D] that of their sum, in which `input` has dropout."""
        weight, bias = self.shared_parameters()
        if residual is None:
            return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)
        return add_norm(input, residual, weight, bias, eps=self.eps, drop=drop, kernels=kernels)

    def shared_parameters(self) -> tuple[Tensor, Tensor]:
        """Weight and bias as the computation uses them."""
        return self.weight, self.bias


def plain_layers() -> LayerSpec:
    """Whole matrices in plain torch modules; imports nothing from megatron-core."""
    return LayerSpec(
        word_embedding=WordEmbedding,
        column_linear=Linear,
        row_linear=Linear,
        vocabulary_parameter=vocabulary_parameter,
        linear=Linear,
        embedding=Embedding,
        layer_norm=LayerNorm,
    )
