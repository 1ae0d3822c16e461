"""BERT on one pipeline stage: token ids in, hidden states, embeddings and vocabulary logits out.

Runs the layers of `layers.py` in order. Parameters are named by the position of their layer in that order, as in
DeepSpeed's PipelineModule, so a checkpoint can move between both wrappers: tied_modules.word (0 and N + 3), 1
(embeddings), 2 .. N + 1 (encoder), N + 2 (transform of the vocabulary head), N + 4 (vocabulary bias).

Shape letters: B rows, L tokens per row, G = B * L places, T computed tokens (those that are no padding), D hidden, M
masked positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.config.sections import ModelSection
from pretrain.errors import ConfigError, counted
from pretrain.model.attention import with_mask
from pretrain.model.compiled import CompiledFunction
from pretrain.model.dropout import DropoutKey
from pretrain.model.initialise import initialise
from pretrain.model.layer_spec import LayerSpec
from pretrain.model.layers import (
    EmbeddingLayer,
    EncoderLayer,
    MlmTransform,
    VocabularyBias,
    compile_encoder_layer,
)
from pretrain.model.token_rows import TokenRows, full_rows, plan_rows


class Bert(nn.Module):
    """Post-LN BERT with the tied masked-language-model head.

    Args:
        vocab_size: words, special tokens included.
        layers: the classes to build from.
        seed: for the initial weights, see `initialise`.
        recompute_layers: this many of the first encoder layers keep no activations and are recomputed in backward.
        has_padding: False promises rows without padding; otherwise padding is left out of the computation.
        separate_documents: rows may hold several documents: a token attends to its own only, with positions from 0.

    Raises:
        ConfigError: the hidden size is not a multiple of the number of heads, or the layout cannot split a size.
    """

    def __init__(
        self,
        config: ModelSection,
        vocab_size: int,
        layers: LayerSpec,
        *,
        seed: int = 0,
        recompute_layers: int = 0,
        has_padding: bool = True,
        separate_documents: bool = False,
    ) -> None:
        super().__init__()
        _check_heads(config, layers)
        self.layers = layers
        self.config = config
        self.vocab_size = vocab_size
        self.recompute_layers = recompute_layers
        self.has_padding = has_padding
        self.separate_documents = separate_documents
        self.run_layer: Callable[..., Tensor] = _call
        self.compiled_parts: list[CompiledFunction] = []
        self.tied_modules = nn.ModuleDict({"word": layers.word_embedding(vocab_size, config.hidden_size)})
        self.add_module("1", EmbeddingLayer(config, layers))
        for index in range(config.num_layers):
            self.add_module(str(2 + index), EncoderLayer(config, layers))
        self.add_module(str(config.num_layers + 2), MlmTransform(config, layers))
        self.add_module(str(config.num_layers + 4), VocabularyBias(vocab_size, layers))
        initialise(self, layers, initializer_range=config.initializer_range, seed=seed)

    @property
    def has_varying_sizes(self) -> bool:
        """Whether micro-batches differ in how many tokens or documents they hold."""
        return self.has_padding or self.separate_documents

    def plan_rows(self, segment_BL: np.ndarray) -> TokenRows:
        """Which tokens of a micro-batch this model computes, on the CPU; made from what the host has anyway."""
        if not self.has_varying_sizes:
            return full_rows(*segment_BL.shape)
        multiple = self.layers.tp_size if self.layers.has_split_tokens else 1
        return plan_rows(segment_BL, separate_documents=self.separate_documents, multiple=multiple)

    def encode(
        self,
        input_ids_BL: Tensor,
        segment_BL: Tensor,
        token_type_BL: Tensor | None = None,
        key: DropoutKey | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Last hidden states h and embeddings e (as the encoder saw them, dropout included), both [G, D].

        Both are whole on every rank that shares the rows, and 0 at padding. Waits for a GPU to tell the segments.

        Args:
            segment_BL: 0 padding, 1, 2, ... documents of a row.
            token_type_BL: BERT's sentence A (0) and B (1); all 0 if left out.
            key: determines which units drop in training; without one, torch's generator of the CPU draws it.

        Raises:
            ConfigError: rows longer than the position embeddings.
        """
        rows = self._rows_of(segment_BL)
        hidden_TD, embedding_TD = self.encode_tokens(input_ids_BL, segment_BL, rows, token_type_BL, key)
        return rows.spread(hidden_TD), rows.spread(embedding_TD)

    def encode_tokens(
        self,
        input_ids_BL: Tensor,
        segment_BL: Tensor,
        rows: TokenRows,
        token_type_BL: Tensor | None = None,
        key: DropoutKey | None = None,
    ) -> tuple[Tensor, Tensor]:
        """h and e as `encode` gives them, but of the tokens that `rows` (from `plan_rows`) computes only, [T, D]."""
        length = input_ids_BL.shape[1]
        if length > self.config.max_position_embeddings:
            raise ConfigError(
                f"rows of {length} tokens are longer than model.max_position_embeddings "
                f"({self.config.max_position_embeddings}); shorten data.seq_length or raise the latter"
            )
        rows = with_mask(rows, segment_BL, self.layers.attention, separate_documents=self.separate_documents)
        word_TD = self.tied_modules["word"](rows.take(input_ids_BL))
        if key is None and self.training:
            key = DropoutKey.draw(self.config.num_layers, input_ids_BL.device)
        embedding_TD = self._layer(1)(word_TD, rows, token_type_BL, None if key is None else key.at(1))
        hidden_TD = embedding_TD
        for number, layer in enumerate(self._encoder_layers()):
            words_PW = None if key is None else key.at(2 + number)
            if number < self.recompute_layers and torch.is_grad_enabled():
                # Random state only for torch's attention on a GPU: all other dropout is a function of its key.
                hidden_TD = checkpoint(
                    self.run_layer,
                    layer,
                    hidden_TD,
                    rows,
                    words_PW,
                    use_reentrant=False,
                    preserve_rng_state=hidden_TD.is_cuda and self.config.attention_dropout > 0,
                )
            else:
                hidden_TD = self.run_layer(layer, hidden_TD, rows, words_PW)
        return self.layers.gather_tokens(hidden_TD), self.layers.gather_tokens(embedding_TD)

    def compile_layers(self, key: str) -> None:
        """Let torch.compile make one graph for all encoder layers at the first call; `key` asked for it."""
        covers = counted(self.config.num_layers, "encoder layer")
        self.run_layer = compile_encoder_layer(self.layers, covers=covers, key=key, dynamic=self.has_varying_sizes)
        self.compiled_parts = [self.run_layer]

    def encoder_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that `encode` reads, by name: those of the embedding and of the encoder layers."""
        head = (f"{self.config.num_layers + 2}.", f"{self.config.num_layers + 4}.")
        return {name: parameter for name, parameter in self.named_parameters() if not name.startswith(head)}

    def predict(self, hidden_TD: Tensor, masked_index_M: Tensor) -> Tensor:
        """Vocabulary logits [M, V] of the hidden states with these numbers; no others are computed."""
        return self._read_logits(hidden_TD.index_select(0, masked_index_M))

    def logits(self, input_ids_BL: Tensor, segment_BL: Tensor, token_type_BL: Tensor | None = None) -> Tensor:
        """Vocabulary logits [B, L, V] of every position, 0 at padding, for exports and tests."""
        rows = self._rows_of(segment_BL)
        hidden_TD, _ = self.encode_tokens(input_ids_BL, segment_BL, rows, token_type_BL)
        return rows.spread(self._read_logits(hidden_TD)).unflatten(0, input_ids_BL.shape)

    def _rows_of(self, segment_BL: Tensor) -> TokenRows:
        return self.plan_rows(segment_BL.cpu().numpy()).to(segment_BL.device)

    def _read_logits(self, hidden_MD: Tensor) -> Tensor:
        logits_MV, _ = self.decode(hidden_MD, is_added=True)
        # A tensor-parallel rank's words are followed by those of the next one.
        return logits_MV[:, : self.vocab_size] if self.layers.tp_size == 1 else logits_MV

    def decode(self, hidden_MD: Tensor, *, is_added: bool = False) -> tuple[Tensor, Tensor]:
        """Logits [M, V] of hidden states, unused rows included, and the vocabulary bias: see `VocabularyBias`."""
        transformed_MD = self._layer(self.config.num_layers + 2)(hidden_MD)
        logits_MV = self.tied_modules["word"](transformed_MD, decode=True)
        decoded: tuple[Tensor, Tensor] = self._layer(self.config.num_layers + 4)(logits_MV, is_added)
        return decoded

    def _encoder_layers(self) -> Iterator[EncoderLayer]:
        return (cast(EncoderLayer, self._layer(2 + index)) for index in range(self.config.num_layers))

    def _layer(self, index: int) -> nn.Module:
        return self.get_submodule(str(index))


def _call(layer: nn.Module, *arguments: Any) -> Any:
    """Not its `forward`: hooks of a module run when it is called, and ZeRO-3 gathers its parameters in one."""
    return layer(*arguments)


def _check_heads(config: ModelSection, layers: LayerSpec) -> None:
    if config.hidden_size % config.num_attention_heads:
        raise ConfigError(
            f"model.hidden_size ({config.hidden_size}) must be a multiple of model.num_attention_heads "
            f"({config.num_attention_heads})"
        )
    if config.num_attention_heads % layers.tp_size:
        raise ConfigError(
            f"model.num_attention_heads ({config.num_attention_heads}) must be a multiple of parallel.tensor "
            f"({layers.tp_size})"
        )
