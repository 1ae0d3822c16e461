"""Self-attention for a CPU, document by document, with dropout.

torch has no fused kernel with dropout for a CPU: it falls back to whole [B, H, L, L] matrices, takes 2.5 times as long
as without dropout at 16 x 8 x 256 x 256, and keeps 75 MB per layer. Here documents of one length are computed together,
as many at a time as stay in the cache, without a mask, and without scores between documents or with padding. Nothing of
the size of the scores is kept: the backward pass recomputes the weights, as FlashAttention does (Dao et al. 2022), and
draws the dropout again.

For torch.compile both passes are operators of their own, because it cannot look into them: the lengths of documents are
data. Without it they are called as they are: an operator would load TorchDynamo, a second at every start.

Shape letters: T tokens, N documents, H attention heads, d features of one head, X = H * 3 * d, Y = H * d; n documents
of l tokens in a group, R = n * H.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain.data.native import native
from pretrain.kernels.attention_dropout import AttentionDropout
from pretrain.kernels.dropout_mask import NUM_WORDS, drop_threshold, keep_mask, keep_scale
from pretrain.kernels.operator import differentiable
from pretrain.model.token_rows import TokenRows

_CACHE_BYTES = 2 << 20


def attention_cpu(qkv_TX: Tensor, rows: TokenRows, head_size: int, drop: AttentionDropout | None) -> Tensor:
    """What `attention.self_attention` computes, in fp32 or wider."""
    bound_N1 = rows.bound_N1
    if bound_N1 is None:
        bound_N1 = torch.arange(rows.num_rows + 1, dtype=torch.int32) * rows.length
    drop = drop or AttentionDropout(0.0, None, 0, 0, rows.length)
    output_TY: Tensor = _attention(qkv_TX, head_size, bound_N1, rows.place_T, *drop)[0]
    return output_TY


def _forward(
    qkv_TX: Tensor, head_size: int, bound_N1: Tensor, place_T: Tensor | None, *drop_values: Any
) -> tuple[Tensor, Tensor]:
    drop = AttentionDropout(*drop_values)
    qkv = qkv_TX.reshape(qkv_TX.shape[0], -1, 3, head_size)
    num_heads = qkv.shape[1]
    output_THd = qkv.new_empty(qkv.shape[0], num_heads, head_size)
    log_sum_TH1 = qkv.new_empty(qkv.shape[0], num_heads, 1, dtype=_work_dtype(qkv))
    room = _Room(qkv)
    for group in _groups(bound_N1, num_heads):
        query, key, value = (group.take(qkv[:, :, part]) for part in range(3))
        weight_Rll = room.multiply(query.mul_(head_size**-0.5), key.transpose(1, 2))
        log_sum_Rl = _weigh(weight_Rll, group.lines(drop, place_T, num_heads), drop)
        group.put(output_THd, torch.bmm(weight_Rll, value))
        group.put(log_sum_TH1, log_sum_Rl[..., None])
    return output_THd.flatten(1), log_sum_TH1.flatten(1)


def _backward(
    grad_TY: Tensor,
    output_TY: Tensor,
    log_sum_TH: Tensor,
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
    scale = head_size**-0.5
    room, other_room = _Room(qkv), _Room(qkv)
    for group in _groups(bound_N1, num_heads):
        query, key, value = (group.take(qkv[:, :, part]) for part in range(3))
        grad_Rld = group.take(grad_THd)
        weight_Rll = room.multiply(query.mul_(scale), key.transpose(1, 2))
        slope_Rll = other_room.multiply(grad_Rld, value.transpose(1, 2))
        inner_Rl = (grad_Rld * group.take(output_THd)).sum(dim=-1)
        log_sum_Rl = group.take(log_sum_TH[..., None])[..., 0]
        _slope(weight_Rll, slope_Rll, log_sum_Rl, inner_Rl, group.lines(drop, place_T, num_heads), drop)
        group.put(grad_qkv[:, :, 2], torch.bmm(weight_Rll.transpose(1, 2), grad_Rld))
        group.put(grad_qkv[:, :, 0], torch.bmm(slope_Rll, key).mul_(scale))
        group.put(grad_qkv[:, :, 1], torch.bmm(slope_Rll.transpose(1, 2), query))
    return grad_qkv.flatten(1)


def _empty_outputs(qkv_TX: Tensor, head_size: int, *_: Any) -> tuple[Tensor, Tensor]:
    num_tokens, width = qkv_TX.shape
    log_sum_TH = qkv_TX.new_empty(num_tokens, width // (3 * head_size), dtype=_work_dtype(qkv_TX))
    return qkv_TX.new_empty(num_tokens, width // 3), log_sum_TH


_attention = differentiable(
    "attention_cpu",
    "Tensor qkv_TX, int head_size, Tensor bound_N1, Tensor? place_T",
    _forward,
    _backward,
    _empty_outputs,
)


# -- element by element: C++ in fp32, and torch, which defines it ------------------------------------------------------


def _weigh(score_Rll: Tensor, line_Rl: Tensor, drop: AttentionDropout) -> Tensor:
    """Turn scores into weights in place, softmax and dropout; returns the logarithms [R, l] of the sums of e^score."""
    threshold = drop_threshold(drop.probability)
    if score_Rll.dtype != torch.float32:
        log_sum_Rl = score_Rll.logsumexp(dim=-1)
        score_Rll.sub_(log_sum_Rl[..., None]).exp_().mul_(_kept(score_Rll, line_Rl, drop))
        return log_sum_Rl
    log_sum_Rl = score_Rll.new_empty(score_Rll.shape[:2])
    native().attention_weights(
        _words(drop).numpy(),
        threshold,
        keep_scale(threshold),
        line_Rl.numpy().reshape(-1),
        drop.row_length,
        score_Rll.flatten(0, 1).numpy(),
        log_sum_Rl.flatten().numpy(),
        torch.get_num_threads(),
    )
    return log_sum_Rl


def _slope(
    score_Rll: Tensor, slope_Rll: Tensor, log_sum_Rl: Tensor, inner_Rl: Tensor, line_Rl: Tensor, drop: AttentionDropout
) -> None:
    """Turn scores into weights, and the gradient of the weights into that of the scores, both in place.

    d score = weight * (d weight - inner), with d weight = 0 where dropped; inner is the sum of weight * d weight.
    """
    threshold = drop_threshold(drop.probability)
    if score_Rll.dtype != torch.float32:
        weight_Rll = score_Rll.sub_(log_sum_Rl[..., None]).exp_()
        kept_Rll = _kept(score_Rll, line_Rl, drop)
        slope_Rll.mul_(kept_Rll).sub_(inner_Rl[..., None]).mul_(weight_Rll)
        weight_Rll.mul_(kept_Rll)
        return
    native().attention_slopes(
        _words(drop).numpy(),
        threshold,
        keep_scale(threshold),
        line_Rl.numpy().reshape(-1),
        drop.row_length,
        log_sum_Rl.flatten().numpy(),
        inner_Rl.flatten().numpy(),
        1.0,
        score_Rll.flatten(0, 1).numpy(),
        slope_Rll.flatten(0, 1).numpy(),
        torch.get_num_threads(),
    )


def _kept(score_Rll: Tensor, line_Rl: Tensor, drop: AttentionDropout) -> Tensor:
    """What the weights are multiplied with: 0 where dropped."""
    if drop.words is None:
        return score_Rll.new_ones(())
    keep_Rll = keep_mask(drop.words, line_Rl, drop.row_length, drop.probability)[..., : score_Rll.shape[2]]
    return keep_Rll * keep_scale(drop_threshold(drop.probability))


def _words(drop: AttentionDropout) -> Tensor:
    return torch.zeros(NUM_WORDS, dtype=torch.int64) if drop.words is None else drop.words


# -- documents ---------------------------------------------------------------------------------------------------------


def _work_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


class _Room:
    """Memory for the scores of one group after the other: fresh memory of their size costs as much as a softmax."""

    def __init__(self, like: Tensor) -> None:
        self._memory = like.new_empty(0, dtype=_work_dtype(like))

    def multiply(self, left_Rld: Tensor, right_Rdl: Tensor) -> Tensor:
        """Their product [R, l, l], which stays until the next one."""
        shape = (*left_Rld.shape[:2], right_Rdl.shape[2])
        num_elements = math.prod(shape)
        if len(self._memory) < num_elements:
            self._memory = self._memory.new_empty(num_elements)
        return torch.bmm(left_Rld, right_Rdl, out=self._memory[:num_elements].view(shape))


class _Group(NamedTuple):
    """Documents of one length whose scores fit in the cache together."""

    first_n: np.ndarray  # int64, the number of their first token
    length: int

    def take(self, part_THd: Tensor) -> Tensor:
        """A fresh contiguous [R, l, d], in fp32 or wider."""
        part_nlHd = part_THd[self._tokens()].view(len(self.first_n), self.length, *part_THd.shape[1:])
        part_nHld = part_nlHd.transpose(1, 2).to(
            _work_dtype(part_THd), memory_format=torch.contiguous_format, copy=True
        )
        return part_nHld.view(-1, self.length, part_THd.shape[-1])

    def put(self, into_THd: Tensor, part_Rld: Tensor) -> None:
        """Write what `take` would read."""
        part_nHld = part_Rld.view(len(self.first_n), -1, self.length, part_Rld.shape[-1])
        into_THd[self._tokens()] = part_nHld.transpose(1, 2).reshape(-1, *into_THd.shape[1:]).to(into_THd.dtype)

    def lines(self, drop: AttentionDropout, place_T: Tensor | None, num_heads: int) -> Tensor:
        """The numbers of the lines of weights in the dropout's mask, int64 [R, l]."""
        token_nl = torch.from_numpy(self.first_n[:, None] + np.arange(self.length))
        place_nl = token_nl if place_T is None else place_T[token_nl]
        return drop.lines(place_nl, num_heads).flatten(0, 1)

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
