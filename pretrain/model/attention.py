"""Self-attention of the tokens of each document over their document: who computes it where.

Shape letters: B rows, L tokens per row, T computed tokens, H attention heads held here, d features of one head.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

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


def with_mask(rows: TokenRows, segment_BL: Tensor, *, separate_documents: bool) -> TokenRows:
    """The rows with the mask that their attention needs on this device, if any."""
    if rows.place_T is None or segment_BL.device.type == "cpu":
        return rows
    return rows._replace(mask=attention_mask(segment_BL, separate_documents=separate_documents))


def self_attention(qkv_TX: Tensor, rows: TokenRows, head_size: int, drop: AttentionDropout | None = None) -> Tensor:
    """Attention of each document over itself, [T, H * d], from projections [T, H * 3 * d] ordered (head, q | k | v, d).

    With the heads outermost, any tensor-parallel size splits the projection's rows into contiguous blocks.
    """
    if qkv_TX.device.type == "cpu":
        return attention_cpu(qkv_TX, rows, head_size, drop)
    qkv = rows.spread(qkv_TX).view(rows.num_rows, rows.length, -1, 3, head_size)
    query, key, value = (part.transpose(1, 2) for part in qkv.unbind(dim=3))
    probability = 0.0 if drop is None else drop.probability
    output_BHLd = F.scaled_dot_product_attention(query, key, value, attn_mask=rows.mask, dropout_p=probability)
    output_BLHd = output_BHLd.transpose(1, 2)
    if rows.place_T is None:
        return output_BLHd.reshape(len(qkv_TX), -1)
    return output_BLHd.flatten(0, 1).index_select(0, rows.place_T).flatten(1)
