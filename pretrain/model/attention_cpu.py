"""Self-attention for a CPU, document by document, with dropout.

torch has no fused kernel with dropout for a CPU: it falls back to whole [B, H, L, L] matrices, takes 2.5 times as long
as without dropout at 16 x 8 x 256 x 256, and keeps 75 MB per layer. Here documents of one length are computed together,
as many at a time as stay in the cache, without a mask, and without scores between documents or with padding. Nothing of
the size of the scores is kept: the backward pass recomputes the weights, as FlashAttention does (Dao et al. 2022), and
draws the dropout again.

Both passes are operators of their own, because torch.compile cannot look into them: the lengths of documents are data.

Shape letters: T tokens, N documents, H attention heads, d features of one head, X = H * 3 * d, Y = H * d; n documents
of l tokens in a group, R = n * H.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain.kernels.attention_dropout import AttentionDropout
from pretrain.kernels.dropout_mask import drop_threshold, keep_scale
from pretrain.model.token_rows import TokenRows

_CACHE_BYTES = 2 << 20


def attention_cpu(qkv_TX: Tensor, rows: TokenRows, head_size: int, drop: AttentionDropout | None) -> Tensor:
    """What `attention.self_attention` computes, in fp32 or wider."""
    bound_N1 = rows.bound_N1
    if bound_N1 is None:
        bound_N1 = torch.arange(rows.num_rows + 1, dtype=torch.int32) * rows.length
    drop = drop or AttentionDropout(0.0, None, 0, 0, rows.length)
    output_TY: Tensor = _forward(qkv_TX, head_size, bound_N1, rows.place_T, *drop)
    return output_TY


_ARGUMENTS = (
    "Tensor qkv_TX, int head_size, Tensor bound_N1, Tensor? place_T, "
    "float probability, Tensor? words, int first_head, int num_heads, int row_length"
)


@torch.library.custom_op("taco::attention_cpu", mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor")
def _forward(qkv_TX: Tensor, head_size: int, bound_N1: Tensor, place_T: Tensor | None, *drop_values: Any) -> Tensor:
    drop = AttentionDropout(*drop_values)
    qkv = qkv_TX.reshape(qkv_TX.shape[0], -1, 3, head_size)
    num_heads = qkv.shape[1]
    output_THd = qkv.new_empty(qkv.shape[0], num_heads, head_size)
    for group in _groups(bound_N1, num_heads):
        query, key, value = (group.take(qkv[:, :, part]) for part in range(3))
        weight_Rll = _weights(query, key)
        if drop.probability > 0:
            weight_Rll.mul_(group.keep(drop, place_T, num_heads))
            value.mul_(keep_scale(drop_threshold(drop.probability)))
        group.put(output_THd, torch.bmm(weight_Rll, value))
    return output_THd.flatten(1)


@torch.library.custom_op(
    "taco::attention_cpu_backward",
    mutates_args=(),
    schema=f"(Tensor grad_TY, Tensor output_TY, {_ARGUMENTS}) -> Tensor",
)
def _backward(
    grad_TY: Tensor,
    output_TY: Tensor,
    qkv_TX: Tensor,
    head_size: int,
    bound_N1: Tensor,
    place_T: Tensor | None,
    *drop_values: Any,
) -> Tensor:
    drop = AttentionDropout(*drop_values)
    qkv = qkv_TX.reshape(qkv_TX.shape[0], -1, 3, head_size)
    num_heads = qkv.shape[1]
    grad_THd, output_THd = (part.reshape(-1, num_heads, head_size) for part in (grad_TY, output_TY))
    grad_qkv = torch.empty_like(qkv)
    for group in _groups(bound_N1, num_heads):
        query, key, value = (group.take(qkv[:, :, part]) for part in range(3))
        grad_Rld = group.take(grad_THd)
        inner_Rl1 = (grad_Rld * group.take(output_THd)).sum(dim=-1, keepdim=True)
        kept_Rll = weight_Rll = _weights(query, key)
        if drop.probability > 0:
            grad_Rld.mul_(keep_scale(drop_threshold(drop.probability)))
            kept_Rll = weight_Rll * group.keep(drop, place_T, num_heads)
        group.put(grad_qkv[:, :, 2], torch.bmm(kept_Rll.transpose(1, 2), grad_Rld))
        # d score = weight * (d weight - inner), with d weight = 0 where dropped; kept is weight * keep already.
        slope_Rll = torch.bmm(grad_Rld, value.transpose(1, 2)).mul_(kept_Rll).addcmul_(weight_Rll, -inner_Rl1)
        slope_Rll.mul_(head_size**-0.5)
        group.put(grad_qkv[:, :, 0], torch.bmm(slope_Rll, key))
        group.put(grad_qkv[:, :, 1], torch.bmm(slope_Rll.transpose(1, 2), query))
    return grad_qkv.flatten(1)


@_forward.register_fake
def _(qkv_TX: Tensor, *_: Any) -> Tensor:
    return qkv_TX.new_empty(qkv_TX.shape[0], qkv_TX.shape[1] // 3)


@_backward.register_fake
def _(grad_TY: Tensor, output_TY: Tensor, qkv_TX: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(qkv_TX)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv_TX, ctx.head_size, bound_N1, place_T, ctx.probability, words, *ctx.numbers = inputs
    ctx.save_for_backward(output, qkv_TX, bound_N1, place_T, words)


def _differentiate(ctx: Any, grad_TY: Tensor) -> tuple[Tensor | None, ...]:
    output_TY, qkv_TX, bound_N1, place_T, words = ctx.saved_tensors
    settings = (ctx.probability, words, *ctx.numbers)
    grad_TX = _backward(grad_TY, output_TY, qkv_TX, ctx.head_size, bound_N1, place_T, *settings)
    return grad_TX, None, None, None, *(None for _ in settings)


_forward.register_autograd(_differentiate, setup_context=_keep_for_backward)


class _Group(NamedTuple):
    """Documents of one length whose scores fit in the cache together."""

    first_n: np.ndarray  # int64, the number of their first token
    length: int

    def take(self, part_THd: Tensor) -> Tensor:
        """A fresh contiguous [R, l, d], in fp32 or wider."""
        dtype = torch.promote_types(part_THd.dtype, torch.float32)
        part_nlHd = part_THd[self._tokens()].view(len(self.first_n), self.length, *part_THd.shape[1:])
        part_nHld = part_nlHd.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format, copy=True)
        return part_nHld.view(-1, self.length, part_THd.shape[-1])

    def put(self, into_THd: Tensor, part_Rld: Tensor) -> None:
        """Write what `take` would read."""
        part_nHld = part_Rld.view(len(self.first_n), -1, self.length, part_Rld.shape[-1])
        into_THd[self._tokens()] = part_nHld.transpose(1, 2).reshape(-1, *into_THd.shape[1:]).to(into_THd.dtype)

    def keep(self, drop: AttentionDropout, place_T: Tensor | None, num_heads: int) -> Tensor:
        """Which of the group's weights to keep, bool [R, l, l]."""
        token_nl = torch.from_numpy(self.first_n[:, None] + np.arange(self.length))
        return drop.keep(token_nl if place_T is None else place_T[token_nl], num_heads).flatten(0, 1)

    def _tokens(self) -> slice | Tensor:
        first, num_documents = int(self.first_n[0]), len(self.first_n)
        if self.first_n[-1] - first == (num_documents - 1) * self.length:
            return slice(first, first + num_documents * self.length)
        return torch.from_numpy((self.first_n[:, None] + np.arange(self.length)).ravel())


def _groups(bound_N1: Tensor, num_heads: int) -> Iterator[_Group]:
    """All documents, those of one length after each other."""
    first_N, length_N = bound_N1[:-1].numpy().astype(np.int64), np.diff(bound_N1.numpy())
    for length in np.unique(length_N):
        first_n = first_N[length_N == length]
        step = max(1, _CACHE_BYTES // (4 * num_heads * int(length) ** 2))
        for start in range(0, len(first_n), step):
            yield _Group(first_n[start : start + step], int(length))


def _weights(query: Tensor, key: Tensor) -> Tensor:
    return torch.bmm(query * query.shape[-1] ** -0.5, key.transpose(1, 2)).softmax(dim=-1)
