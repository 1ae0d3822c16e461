"""The post-LN BERT layers (Devlin et al. 2019), one class per kind; they do not know whether they are parallel.

Each class belongs to one place in the sequence that `bert.py` runs on one stage and a pipeline splits over several. The
classes of the linears come from a `LayerSpec`. Hidden states are token-flat: the T tokens of `TokenRows`, which are no
padding, so a linear is one plain product, and sequence parallelism is a split of dim 0.

Shape letters: B rows, L tokens per row, T computed tokens, D hidden, F feed-forward, M masked positions, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config.sections import ModelSection
from pretrain.kernels.attention_dropout import AttentionDropout
from pretrain.kernels.dropout import dropout
from pretrain.kernels.dropout_mask import HiddenDropout
from pretrain.kernels.recompute import recomputed_for_backward
from pretrain.model.attention import self_attention
from pretrain.model.compiled import CompiledFunction
from pretrain.model.dropout import AFTER_ATTENTION, AFTER_FFN, ATTENTION_WEIGHTS
from pretrain.model.layer_spec import HoldsWords, LayerNorm, LayerSpec
from pretrain.model.token_rows import TokenRows


class EmbeddingLayer(nn.Module):
    """Layer 1: word + position + token-type embeddings, LayerNorm, dropout. Its output is TACO's e."""

    def __init__(self, config: ModelSection, layers: LayerSpec) -> None:
        super().__init__()
        self.position = layers.embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type = layers.embedding(config.type_vocab_size, config.hidden_size)
        self.norm = layers.layer_norm(config.hidden_size, config.layer_norm_eps)
        self.layers = layers
        self.hidden_dropout = config.hidden_dropout

    def forward(
        self,
        word_TD: Tensor,
        rows: TokenRows,
        token_type_BL: Tensor | None = None,
        words_PW: Tensor | None = None,
    ) -> Tensor:
        """Embeddings e [T, D] of words [T, D] at the positions that `rows` says; all of type 0 if none are given.

        `words_PW` key the dropout: `DropoutKey.at`. Without them nothing drops.
        """
        place_TD = self.layers.scatter_tokens(self._places(rows, token_type_BL, word_TD.device))
        embedding_TD: Tensor = self.norm(word_TD, place_TD, None, self.layers.kernels)
        drop = hidden_dropout(self, words_PW, AFTER_ATTENTION, len(word_TD), rows)
        return dropout(embedding_TD, drop, self.layers.kernels)

    def _places(self, rows: TokenRows, token_type_BL: Tensor | None, device: torch.device) -> Tensor:
        """Sum of the position and token-type embeddings of every token, [T, D]."""
        if token_type_BL is None:
            token_type_BL = torch.zeros(rows.num_rows, rows.length, dtype=torch.int64, device=device)
        if rows.position_T is not None:
            token_type_TD: Tensor = self.token_type(rows.take(token_type_BL))
            return token_type_TD + self.position(rows.position_T)
        position_L = torch.arange(rows.length, device=device)
        place_BLD: Tensor = self.token_type(token_type_BL) + self.position(position_L)
        return place_BLD.flatten(0, 1)


class EncoderLayer(nn.Module):
    """Layers 2 .. N + 1: self-attention and feed-forward, each followed by dropout, residual and LayerNorm."""

    def __init__(self, config: ModelSection, layers: LayerSpec) -> None:
        super().__init__()
        size, inner_size = config.hidden_size, config.ffn_hidden_size
        self.qkv = layers.column_linear(size, 3 * size)
        self.attention_out = layers.row_linear(size, size)
        self.attention_norm = layers.layer_norm(size, config.layer_norm_eps)
        self.ffn_in = layers.column_linear(size, inner_size)
        self.ffn_out = layers.row_linear(inner_size, size)
        self.ffn_norm = layers.layer_norm(size, config.layer_norm_eps)
        self.head_size = config.head_size
        self.hidden_dropout = config.hidden_dropout
        self.attention_dropout = config.attention_dropout
        self.num_heads = config.num_attention_heads
        self.layers = layers

    def forward(self, hidden_TD: Tensor, rows: TokenRows, words_PW: Tensor | None = None) -> Tensor:
        """The next hidden states [T, D]; `words_PW` key the dropout: `DropoutKey.at`."""
        drop = None
        if self.training and self.attention_dropout > 0.0 and words_PW is not None:
            first_head = self.layers.tp_rank * (self.num_heads // self.layers.tp_size)
            words = words_PW[ATTENTION_WEIGHTS]
            drop = AttentionDropout(self.attention_dropout, words, first_head, self.num_heads, rows.length)
        context_TD = self_attention(self.qkv(hidden_TD), rows, self.head_size, drop, self.layers.attention)
        branch_TD = self.attention_out(context_TD)
        after_attention = hidden_dropout(self, words_PW, AFTER_ATTENTION, len(hidden_TD), rows)
        hidden_TD = self.attention_norm(branch_TD, hidden_TD, after_attention, self.layers.kernels)
        branch_TD = self._feed_forward(hidden_TD)
        after_ffn = hidden_dropout(self, words_PW, AFTER_FFN, len(hidden_TD), rows)
        normalised_TD: Tensor = self.ffn_norm(branch_TD, hidden_TD, after_ffn, self.layers.kernels)
        return normalised_TD

    def _feed_forward(self, hidden_TD: Tensor) -> Tensor:
        inner_TF = self.ffn_in(hidden_TD)
        activated_TF = F.gelu(inner_TF)
        if not self.layers.recomputes_elementwise:
            return self.ffn_out(activated_TF)
        with recomputed_for_backward(activated_TF, F.gelu, inner_TF):
            return self.ffn_out(activated_TF)


def compile_encoder_layer(
    layers: LayerSpec, *, covers: str, key: str, dynamic: bool = False, is_kept: bool = False
) -> CompiledFunction:
    """`EncoderLayer.forward`, compiled once for all layers; `CompiledFunction` explains the arguments.

    Tensor-parallel linears of megatron-core stay outside of the graphs, because they wait for their collectives.
    """
    return CompiledFunction(
        EncoderLayer.forward,
        what="the encoder layer",
        covers=covers,
        key=key,
        is_whole=layers.tp_size == 1,
        dynamic=dynamic,
        is_kept=is_kept,
    )


class MlmTransform(nn.Module):
    """Layer N + 2: the vocabulary head before its decoder: dense, GELU, LayerNorm."""

    def __init__(self, config: ModelSection, layers: LayerSpec) -> None:
        super().__init__()
        self.dense = layers.linear(config.hidden_size, config.hidden_size)
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, hidden_MD: Tensor) -> Tensor:
        """Transformed hidden states [M, D]."""
        return self.norm(F.gelu(self.dense(hidden_MD)))


class VocabularyBias(HoldsWords):
    """Layer N + 4: one bias per word, after the tied decoder (layer N + 3, which has no parameters of its own)."""

    def __init__(self, vocab_size: int, layers: LayerSpec) -> None:
        super().__init__()
        self.bias = layers.vocabulary_parameter(vocab_size)
        self.num_unused = layers.num_unused_words(vocab_size)

    def forward(self, logits_MV: Tensor, is_added: bool = False) -> tuple[Tensor, Tensor]:
        """The logits, and the bias [V] for the loss, which adds it in a pass over [M, V] that it makes anyway.

        Args:
            is_added: the bias is in the logits, and those of unused rows are minus infinity; for who reads them.
        """
        # A copy, because ZeRO-3 takes the parameter away when this module returns.
        bias_V = self.bias.clone()
        if is_added:
            logits_MV = logits_MV + bias_V
            logits_MV[:, logits_MV.shape[1] - self.num_unused :] = -torch.inf
        return logits_MV, bias_V


def hidden_dropout(
    layer: EmbeddingLayer | EncoderLayer, words_PW: Tensor | None, place: int, num_tokens: int, rows: TokenRows
) -> HiddenDropout | None:
    """What drops of the `num_tokens` tokens that a layer holds on this rank; None where nothing does."""
    if not layer.training or layer.hidden_dropout == 0.0 or words_PW is None:
        return None
    first = layer.layers.first_token(num_tokens)
    return HiddenDropout(layer.hidden_dropout, words_PW[place], first, rows.places(first, num_tokens))
