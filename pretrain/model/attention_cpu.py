"""Self-attention with dropout for a CPU, where torch has no fused kernel for it.

torch falls back to whole [B, H, L, L] matrices there: at 16 x 8 x 256 x 256 it takes 2.5 times as long as attention
without dropout, and keeps 75 MB per layer. Here rows are processed one at a time, so their matrices stay in the cache
(1.3 times), and nothing of their size is kept; the backward pass recomputes the weights, as FlashAttention does (Dao et
al. 2022), and draws the dropout mask again.

Shape letters: B rows, L tokens per row, T = B * L tokens, H attention heads, d features of one head, X = H * 3 * d,
Y = H * d.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.kernels.dropout_mask import drop_threshold, keep_mask, keep_scale


class AttentionDropout(NamedTuple):
    """Which attention weights drop: a line of `dropout_mask` is the keys of one query and head."""

    probability: float
    words: Tensor
    """Of the place in the model: `DropoutKey.at`."""
    first_head: int
    """The number of the first head held here, among all `num_heads` of the model."""
    num_heads: int

    def keep(self, row: int, num_heads_here: int, length: int) -> Tensor:
        """Which weights of a row to keep, bool [H, L, L]."""
        token_L = torch.arange(row * length, (row + 1) * length)
        line_HL = token_L * self.num_heads + torch.arange(self.first_head, self.first_head + num_heads_here)[:, None]
        return keep_mask(self.words, line_HL, length, self.probability)


def dropout_attention_cpu(
    qkv_TX: Tensor, num_rows: int, head_size: int, mask: Tensor | None, drop: AttentionDropout
) -> Tensor:
    """What `attention.self_attention` computes, with dropout on the attention weights; computed in fp32 or wider."""
    output_TY: Tensor = _DropoutAttention.apply(qkv_TX, num_rows, head_size, mask, drop)
    return output_TY


class _DropoutAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv_TX: Tensor, num_rows: int, head_size: int, mask: Tensor | None, drop: AttentionDropout
    ) -> Tensor:
        qkv = qkv_TX.view(num_rows, qkv_TX.shape[0] // num_rows, -1, 3, head_size)
        _, length, num_heads, _, _ = qkv.shape
        scale = keep_scale(drop_threshold(drop.probability))
        output = qkv.new_empty(num_rows, length, num_heads, head_size)
        for row, (query, key, value) in enumerate(_rows(qkv)):
            weight_HLL = _weights(query, key, mask, row).mul_(drop.keep(row, num_heads, length))
            output[row] = torch.bmm(weight_HLL, value.mul_(scale)).transpose(0, 1)
        ctx.save_for_backward(qkv, output, mask, drop.words)
        ctx.drop = drop
        ctx.scale = scale
        return output.view(qkv_TX.shape[0], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TY: Tensor) -> tuple[Tensor | None, ...]:
        qkv, output, mask, words = ctx.saved_tensors
        drop: AttentionDropout = ctx.drop._replace(words=words)
        _, length, num_heads, _, _ = qkv.shape
        grad_qkv = torch.empty_like(qkv)
        for row, (query, key, value) in enumerate(_rows(qkv)):
            grad_HLd = _by_head(grad_TY.view(output.shape)[row])
            inner_HL1 = (grad_HLd * _by_head(output[row])).sum(dim=-1, keepdim=True)
            weight_HLL = _weights(query, key, mask, row)
            grad_HLd.mul_(ctx.scale)
            kept_HLL = weight_HLL * drop.keep(row, num_heads, length)
            grad_qkv[row, :, :, 2] = torch.bmm(kept_HLL.transpose(1, 2), grad_HLd).transpose(0, 1)
            # d score = weight * (d weight - inner), with d weight = 0 where dropped; kept is weight * keep already.
            slope_HLL = torch.bmm(grad_HLd, value.transpose(1, 2)).mul_(kept_HLL).addcmul_(weight_HLL, -inner_HL1)
            slope_HLL.mul_(query.shape[-1] ** -0.5)
            grad_qkv[row, :, :, 0] = torch.bmm(slope_HLL, key).transpose(0, 1)
            grad_qkv[row, :, :, 1] = torch.bmm(slope_HLL.transpose(1, 2), query).transpose(0, 1)
        return grad_qkv.flatten(0, 1).flatten(1), None, None, None, None


def _rows(qkv: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Fresh query, key and value [H, L, d] of each row, in fp32 or wider."""
    for row in qkv:
        query, key, value = (_by_head(row[:, :, part]) for part in range(3))
        yield query, key, value


def _by_head(part_LHd: Tensor) -> Tensor:
    """A contiguous copy [H, L, d]; in-place operations on it leave the original alone."""
    dtype = torch.promote_types(part_LHd.dtype, torch.float32)
    return part_LHd.transpose(0, 1).to(dtype, memory_format=torch.contiguous_format, copy=True)


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, row: int) -> Tensor:
    score_HLL = torch.bmm(query * query.shape[-1] ** -0.5, key.transpose(1, 2))
    if mask is not None:
        score_HLL.masked_fill_(~mask[row], -torch.inf)
    return score_HLL.softmax(dim=-1)
