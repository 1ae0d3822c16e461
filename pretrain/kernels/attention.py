"""Self-attention of documents in one pass over the scores, with dropout: a Triton kernel each for forward and backward.

FlashAttention-2 (Dao 2023) over token-flat documents of any length: a program computes one block of `TokenRows` and one
head, and reads the keys of its own document only. No mask, no padding, no scores between documents. The twin for a CPU
is `model/attention_cpu.py`; both draw the same dropout, see `attention_dropout.py`.

Shape letters: T tokens, H heads held here, d features of a head, X = H * 3 * d, Y = H * d, K blocks.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pretrain.kernels.attention_choice import ATTENTION_BLOCK
from pretrain.kernels.attention_dropout import AttentionDropout
from pretrain.kernels.dropout_mask import BLOCK_SIZE, drop_threshold, keep_scale
from pretrain.kernels.operator import differentiable
from pretrain.kernels.philox import draw_blocks

_LOG_2_OF_E = 1.4426950408889634


@triton.jit
def _load(pointer, token, is_inside, stride, feature, size: tl.constexpr):
    """[tokens, features] from the rows `token` of a matrix; 0 outside."""
    offset = token.to(tl.int64)[:, None] * stride + feature[None, :]
    return tl.load(pointer + offset, mask=is_inside[:, None] & (feature < size)[None, :], other=0.0)


@triton.jit
def _store(pointer, value, token, is_inside, stride, feature, size: tl.constexpr):
    offset = token.to(tl.int64)[:, None] * stride + feature[None, :]
    tl.store(pointer + offset, value.to(pointer.dtype.element_ty), mask=is_inside[:, None] & (feature < size)[None, :])


@triton.jit
def _keep(words, line, first_key, threshold, row_blocks, keys: tl.constexpr):
    """Which weights to keep, [queries, keys]: those of each query's line from key `first_key`, a multiple of 8, on."""
    block = (line * row_blocks + first_key // 8)[:, None] + tl.arange(0, keys // 8)[None, :]
    word_0, word_1, word_2, word_3 = draw_blocks(words, block)
    # Eight half-words of a block after each other: words in order, the low half first.
    word = tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3))
    level = tl.join(word & 0xFFFF, word >> 16).reshape(line.shape[0], keys)
    return level.to(tl.int32) >= threshold


@triton.jit
def _line(place, token, is_inside, head, num_heads, has_places: tl.constexpr):
    """The number of each query's line of weights."""
    number = token.to(tl.int64)
    if has_places:
        number = tl.load(place + number, mask=is_inside, other=0)
    return number * num_heads + head


# The number of tokens differs from micro-batch to micro-batch: no kernel of its own for one that 16 divides.
@triton.jit(do_not_specialize=["num_tokens"])
def _forward_kernel(
    qkv, out, log_sum, blocks, place, words,
    num_tokens, first_head, num_heads, row_blocks, threshold, keep_scale, scale_log2e,
    heads_here: tl.constexpr, size: tl.constexpr, padded_size: tl.constexpr,
    queries: tl.constexpr, keys: tl.constexpr,
    is_dropped: tl.constexpr, has_places: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    start = tl.load(blocks + 3 * tl.program_id(0))
    first = tl.load(blocks + 3 * tl.program_id(0) + 1)
    end = tl.load(blocks + 3 * tl.program_id(0) + 2)
    feature = tl.arange(0, padded_size)
    stride: tl.constexpr = heads_here * 3 * size
    qkv += head * (3 * size)
    token = start + tl.arange(0, queries)
    is_inside = token < end
    query = _load(qkv, token, is_inside, stride, feature, size)
    total = tl.zeros([queries, padded_size], tl.float32)
    highest = tl.full([queries], float("-inf"), tl.float32)
    weight_sum = tl.zeros([queries], tl.float32)
    if is_dropped:
        line = _line(place, token, is_inside, first_head + head, num_heads, has_places)
    for begin in range(first, end, keys):
        key_token = begin + tl.arange(0, keys)
        is_key = key_token < end
        key = _load(qkv + size, key_token, is_key, stride, feature, size)
        score = tl.dot(query, tl.trans(key), input_precision=precision) * scale_log2e
        score = tl.where(is_key[None, :], score, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(score, 1))
        shrink = tl.exp2(highest - new_highest)
        weight = tl.exp2(score - new_highest[:, None])
        weight_sum = weight_sum * shrink + tl.sum(weight, 1)
        if is_dropped:
            weight = tl.where(_keep(words, line, begin - first, threshold, row_blocks, keys), weight, 0.0)
        value = _load(qkv + 2 * size, key_token, is_key, stride, feature, size)
        total = total * shrink[:, None] + tl.dot(weight.to(value.dtype), value, input_precision=precision)
        highest = new_highest
    _store(
        out + head * size,
        total * (keep_scale / weight_sum)[:, None],
        token,
        is_inside,
        heads_here * size,
        feature,
        size,
    )
    tl.store(log_sum + head.to(tl.int64) * num_tokens + token, highest + tl.log2(weight_sum), mask=is_inside)


@triton.jit(do_not_specialize=["num_tokens"])
def _backward_kernel(
    qkv, grad_out, log_sum, inner, grad_qkv, blocks, place, words,
    num_tokens, first_head, num_heads, row_blocks, threshold, keep_scale, scale, scale_log2e,
    heads_here: tl.constexpr, size: tl.constexpr, padded_size: tl.constexpr,
    block: tl.constexpr, step: tl.constexpr,
    is_dropped: tl.constexpr, has_places: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Gradients of a block's keys and values, from all queries of its document; then of its queries, from all keys."""
    head = tl.program_id(1)
    start = tl.load(blocks + 3 * tl.program_id(0))
    first = tl.load(blocks + 3 * tl.program_id(0) + 1)
    end = tl.load(blocks + 3 * tl.program_id(0) + 2)
    feature = tl.arange(0, padded_size)
    stride: tl.constexpr = heads_here * 3 * size
    out_stride: tl.constexpr = heads_here * size
    qkv += head * (3 * size)
    grad_qkv += head * (3 * size)
    grad_out += head * size
    log_sum += head.to(tl.int64) * num_tokens
    inner += head.to(tl.int64) * num_tokens
    token = start + tl.arange(0, block)
    is_inside = token < end

    key = _load(qkv + size, token, is_inside, stride, feature, size)
    value = _load(qkv + 2 * size, token, is_inside, stride, feature, size)
    grad_key = tl.zeros([block, padded_size], tl.float32)
    grad_value = tl.zeros([block, padded_size], tl.float32)
    for begin in range(first, end, step):
        other = begin + tl.arange(0, step)
        is_other = other < end
        query = _load(qkv, other, is_other, stride, feature, size)
        grad = _load(grad_out, other, is_other, out_stride, feature, size)
        score = tl.dot(query, tl.trans(key), input_precision=precision) * scale_log2e
        weight = tl.exp2(score - tl.load(log_sum + other, mask=is_other, other=0.0)[:, None])
        weight = tl.where(is_other[:, None] & is_inside[None, :], weight, 0.0)
        kept = weight
        slope = tl.dot(grad, tl.trans(value), input_precision=precision)
        if is_dropped:
            line = _line(place, other, is_other, first_head + head, num_heads, has_places)
            keep = _keep(words, line, start - first, threshold, row_blocks, block)
            kept = tl.where(keep, weight * keep_scale, 0.0)
            slope = tl.where(keep, slope * keep_scale, 0.0)
        grad_value += tl.dot(tl.trans(kept.to(grad.dtype)), grad, input_precision=precision)
        slope = weight * (slope - tl.load(inner + other, mask=is_other, other=0.0)[:, None])
        grad_key += tl.dot(tl.trans(slope.to(query.dtype)), query, input_precision=precision)
    _store(grad_qkv + size, grad_key * scale, token, is_inside, stride, feature, size)
    _store(grad_qkv + 2 * size, grad_value, token, is_inside, stride, feature, size)

    own_query = _load(qkv, token, is_inside, stride, feature, size)
    own_grad = _load(grad_out, token, is_inside, out_stride, feature, size)
    own_log_sum = tl.load(log_sum + token, mask=is_inside, other=0.0)
    own_inner = tl.load(inner + token, mask=is_inside, other=0.0)
    grad_query = tl.zeros([block, padded_size], tl.float32)
    if is_dropped:
        own_line = _line(place, token, is_inside, first_head + head, num_heads, has_places)
    for begin in range(first, end, step):
        other = begin + tl.arange(0, step)
        is_other = other < end
        other_key = _load(qkv + size, other, is_other, stride, feature, size)
        other_value = _load(qkv + 2 * size, other, is_other, stride, feature, size)
        score = tl.dot(own_query, tl.trans(other_key), input_precision=precision) * scale_log2e
        weight = tl.where(is_other[None, :], tl.exp2(score - own_log_sum[:, None]), 0.0)
        slope = tl.dot(own_grad, tl.trans(other_value), input_precision=precision)
        if is_dropped:
            keep = _keep(words, own_line, begin - first, threshold, row_blocks, step)
            slope = tl.where(keep, slope * keep_scale, 0.0)
        slope = weight * (slope - own_inner[:, None])
        grad_query += tl.dot(slope.to(other_key.dtype), other_key, input_precision=precision)
    _store(grad_qkv, grad_query * scale, token, is_inside, stride, feature, size)


def triton_attention(
    qkv_TX: Tensor, head_size: int, block_K3: Tensor, place_T: Tensor | None, drop: AttentionDropout | None
) -> Tensor:
    """Attention of each document over itself, [T, H * d], from projections [T, H * 3 * d] ordered (head, q | k | v, d).

    Args:
        qkv_TX: fp32, bf16 or fp16.
        head_size: at most 128.
        block_K3: int32, for each block of ATTENTION_BLOCK tokens its first token, and the first token and the end of
            its document; the blocks cover every token once.
        place_T: int64, the places of the tokens in the grid, by which dropout numbers them; None if 0, 1, 2, ....
        drop: which attention weights drop.
    """
    if qkv_TX.dtype == torch.bfloat16 and not qkv_TX.is_cuda:  # Triton's interpreter multiplies bf16 as integers
        return triton_attention(qkv_TX.float(), head_size, block_K3, place_T, drop).to(qkv_TX.dtype)
    drop = drop or AttentionDropout(0.0, None, 0, 1, 0)
    output_TY: Tensor = _attention(qkv_TX, head_size, block_K3, place_T, *drop)[0]
    return output_TY


def _forward(
    qkv_TX: Tensor, head_size: int, block_K3: Tensor, place_T: Tensor | None, *drop_values: Any
) -> tuple[Tensor, Tensor]:
    qkv_TX = qkv_TX.contiguous()
    drop = AttentionDropout(*drop_values)
    num_tokens, num_heads = len(qkv_TX), qkv_TX.shape[1] // (3 * head_size)
    output_TY = qkv_TX.new_empty(num_tokens, num_heads * head_size)
    log_sum_HT = qkv_TX.new_empty(num_heads, num_tokens, dtype=torch.float32)
    _forward_kernel[(len(block_K3), num_heads)](
        qkv_TX,
        output_TY,
        log_sum_HT,
        *_pointers(block_K3, place_T, drop),
        num_tokens,
        *_dropout_numbers(drop),
        head_size**-0.5 * _LOG_2_OF_E,
        **_constants(qkv_TX, head_size, place_T, drop),
        queries=ATTENTION_BLOCK,
        keys=_step(qkv_TX, head_size),
    )
    return output_TY, log_sum_HT


def _backward(
    grad_TY: Tensor,
    output_TY: Tensor,
    log_sum_HT: Tensor,
    qkv_TX: Tensor,
    head_size: int,
    block_K3: Tensor,
    place_T: Tensor | None,
    *drop_values: Any,
) -> Tensor:
    qkv_TX, grad_TY = qkv_TX.contiguous(), grad_TY.contiguous()
    drop = AttentionDropout(*drop_values)
    num_heads, num_tokens = log_sum_HT.shape
    # d score = weight * (d weight - inner), with inner the sum of weight * d weight over a query's keys.
    inner_TH = (grad_TY.float() * output_TY).view(num_tokens, num_heads, head_size).sum(dim=-1)
    grad_qkv_TX = torch.empty_like(qkv_TX)
    scale = head_size**-0.5
    _backward_kernel[(len(block_K3), num_heads)](
        qkv_TX,
        grad_TY,
        log_sum_HT,
        inner_TH.t().contiguous(),
        grad_qkv_TX,
        *_pointers(block_K3, place_T, drop),
        num_tokens,
        *_dropout_numbers(drop),
        scale,
        scale * _LOG_2_OF_E,
        **_constants(qkv_TX, head_size, place_T, drop),
        block=ATTENTION_BLOCK,
        step=_step(qkv_TX, head_size),
    )
    return grad_qkv_TX


def _empty_outputs(qkv_TX: Tensor, head_size: int, *_: Any) -> tuple[Tensor, Tensor]:
    num_tokens, width = qkv_TX.shape
    log_sum_HT = qkv_TX.new_empty(width // (3 * head_size), num_tokens, dtype=torch.float32)
    return qkv_TX.new_empty(num_tokens, width // 3), log_sum_HT


_attention = differentiable(
    "attention_triton",
    "Tensor qkv_TX, int head_size, Tensor block_K3, Tensor? place_T",
    _forward,
    _backward,
    _empty_outputs,
)


def _pointers(block_K3: Tensor, place_T: Tensor | None, drop: AttentionDropout) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks, places and words; where a kernel reads none, any tensor will do."""
    return block_K3, block_K3 if place_T is None else place_T, block_K3 if drop.words is None else drop.words


def _dropout_numbers(drop: AttentionDropout) -> tuple[int, int, int, int, float]:
    """What the kernels take for dropout: first head, heads, blocks of a line, threshold, scale."""
    threshold = drop_threshold(drop.probability)
    return drop.first_head, drop.num_heads, -(-drop.row_length // BLOCK_SIZE), threshold, keep_scale(threshold)


def _constants(qkv_TX: Tensor, head_size: int, place_T: Tensor | None, drop: AttentionDropout) -> dict[str, Any]:
    is_fp32 = qkv_TX.dtype == torch.float32
    return {
        "heads_here": qkv_TX.shape[1] // (3 * head_size),
        "size": head_size,
        "padded_size": max(16, triton.next_power_of_2(head_size)),
        "is_dropped": drop.probability > 0,
        "has_places": place_T is not None,
        "precision": "ieee" if is_fp32 else "tf32",  # TF32 would keep 11 bits of fp32
        "num_warps": _num_warps(is_fp32, head_size),
        "num_stages": 1 if is_fp32 else 2,
    }


def _num_warps(is_fp32: bool, head_size: int) -> int:
    """Warps of a program: products in fp32 have no tensor cores, and with fewer their sums leave the registers."""
    if is_fp32:
        return 8 if head_size <= 64 else 16
    return 4


def _step(qkv_TX: Tensor, head_size: int) -> int:
    """Tokens of the other side that a program reads at once: what fits with its own into its memory."""
    if qkv_TX.dtype == torch.float32:
        return 32 if head_size <= 64 else 16
    return 64 if head_size <= 64 else 32
