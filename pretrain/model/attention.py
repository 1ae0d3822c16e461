"""Self-attention of token-flat rows: which tokens attend to each other, and the scaled dot product itself.

Shape letters: B rows, L tokens per row, T = B * L tokens, H attention heads held here, d features of one head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.attention_cpu import AttentionDropout, dropout_attention_cpu

__all__ = ["AttentionDropout", "attention_mask", "document_positions", "self_attention"]


def attention_mask(segment_BL: Tensor, *, has_padding: bool, separate_documents: bool) -> Tensor | None:
    """True where a query (dim 2) attends to a key (dim 3): None for all, [B, 1, 1, L] or, by document, [B, 1, L, L].

    Segment 0 is padding, 1, 2, ... number the documents of a row. Without padding, attention needs no mask and can use
    its fastest kernel. Every query keeps a key, because softmax over nothing is NaN: in a row of nothing but padding
    every token attends to every other.
    """
    if separate_documents:
        return (segment_BL[:, :, None] == segment_BL[:, None, :])[:, None]
    if not has_padding:
        return None
    is_token_BL = segment_BL > 0
    return (is_token_BL | ~is_token_BL.any(dim=1, keepdim=True))[:, None, None, :]


def document_positions(segment_BL: Tensor) -> Tensor:
    """Positions of tokens in their document, counted from 0, int64 [B, L]; padding counts as one more document."""
    column_L = torch.arange(segment_BL.shape[1], device=segment_BL.device)
    is_first_BL = torch.ones_like(segment_BL, dtype=torch.bool)
    is_first_BL[:, 1:] = segment_BL[:, 1:] != segment_BL[:, :-1]
    first_BL = torch.where(is_first_BL, column_L, 0).cummax(dim=1).values
    return column_L - first_BL


def self_attention(
    qkv_TX: Tensor, num_rows: int, head_size: int, mask: Tensor | None, drop: AttentionDropout | None = None
) -> Tensor:
    """Attention of every row over itself, [T, H * d], from projections [T, H * 3 * d] ordered (head, q | k | v, d).

    With the heads outermost, any tensor-parallel size splits the projection's rows into contiguous blocks.
    """
    if drop is not None and qkv_TX.device.type == "cpu":
        return dropout_attention_cpu(qkv_TX, num_rows, head_size, mask, drop)
    num_tokens = qkv_TX.shape[0]
    qkv = qkv_TX.view(num_rows, num_tokens // num_rows, -1, 3, head_size)
    query, key, value = (part.transpose(1, 2) for part in qkv.unbind(dim=3))
    output_BHLd = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=drop.probability if drop is not None else 0.0
    )
    return output_BHLd.transpose(1, 2).reshape(num_tokens, -1)
