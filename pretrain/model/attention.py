"""Self-attention of the tokens of each document over their document: who computes it where.

Shape letters: B rows, L tokens per row, T computed tokens, H attention heads held here, d features of one head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.kernels.attention_choice import Attention
from pretrain.kernels.attention_dropout import AttentionDropout
from pretrain.model.attention_cpu import attention_cpu
from pretrain.model.token_rows import TokenRows


def attention_mask(segment_BL: Tensor, *, separate_documents: bool) -> Tensor:
    """True where a query (dim 2) attends to a key (dim 3): [B, 1, 1, L] or, by document, [B, 1, L, L].

    Segment 0 is padding, 1, 2, ... number the documents of a row. Every query keeps a key, because softmax over nothing
    is NaN: in a row of nothing but padding every token attends to every other.
    """
    if separate_documents:
        return (segment_BL[:, :, None] == segment_BL[:, None, :])[:, None]
    is_token_BL = segment_BL > 0
    return (is_token_BL | ~is_token_BL.any(dim=1, keepdim=True))[:, None, None, :]


def with_mask(rows: TokenRows, segment_BL: Tensor, attention: Attention, *, separate_documents: bool) -> TokenRows:
    """The rows with the mask that their attention needs on this device, if any."""
    if attention != "torch" or rows.place_T is None or segment_BL.device.type == "cpu":
        return rows
    return rows._replace(mask=attention_mask(segment_BL, separate_documents=separate_documents))


def self_attention(
    qkv_TX: Tensor,
    rows: TokenRows,
    head_size: int,
    drop: AttentionDropout | None = None,
    attention: Attention = "torch",
) -> Tensor:
    """Attention of each document over itself, [T, H * d], from projections [T, H * 3 * d] ordered (head, q | k | v, d).

    With the heads outermost, any tensor-parallel size splits the projection's rows into contiguous blocks.
    """
    if attention == "triton":
        from pretrain.kernels.attention import triton_attention

        assert rows.block_K3 is not None
        return triton_attention(qkv_TX, head_size, rows.block_K3, rows.place_T, drop)
    if attention == "torch":
        if qkv_TX.device.type == "cpu":
            return attention_cpu(qkv_TX, rows, head_size, drop)
        return _attention_of_rows(qkv_TX, rows, head_size, drop)
    return _attention_of_package(qkv_TX, rows, head_size, drop, attention)


def _attention_of_package(
    qkv_TX: Tensor, rows: TokenRows, head_size: int, drop: AttentionDropout | None, attention: Attention
) -> Tensor:
    """By torch's or flash-attn's kernels for documents of any length."""
    assert rows.bound_N1 is not None
    query, key, value = qkv_TX.view(len(qkv_TX), -1, 3, head_size).unbind(dim=2)
    # A row's length is a bound for its documents, known without waiting for a GPU; a longer grid costs little.
    bounds = (rows.bound_N1, rows.bound_N1, rows.length, rows.length)
    output_THd: Any
    if attention == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        output_THd = varlen_attn(query, key, value, *bounds)
    else:
        from flash_attn import flash_attn_varlen_func

        output_THd = flash_attn_varlen_func(
            query,
            key,
            value,
            *bounds,
            dropout_p=0.0 if drop is None else drop.probability,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
    output_TY: Tensor = output_THd.flatten(1)
    return output_TY


def _attention_of_rows(qkv_TX: Tensor, rows: TokenRows, head_size: int, drop: AttentionDropout | None) -> Tensor:
    """By torch's kernels, over the grid, with a mask where rows are not full."""
    qkv = rows.spread(qkv_TX).view(rows.num_rows, rows.length, -1, 3, head_size)
    query, key, value = (part.transpose(1, 2) for part in qkv.unbind(dim=3))
    probability = 0.0 if drop is None else drop.probability
    output_BHLd = F.scaled_dot_product_attention(query, key, value, attn_mask=rows.mask, dropout_p=probability)
    output_BLHd = output_BHLd.transpose(1, 2)
    if rows.place_T is None:
        return output_BLHd.reshape(len(qkv_TX), -1)
    return output_BLHd.flatten(0, 1).index_select(0, rows.place_T).flatten(1)
