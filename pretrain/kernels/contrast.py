"""TACO's token contrastive loss in Triton; `objectives.taco.token_contrastive_loss` over `sample_pairs` defines it.

Three launches forward: the unit vectors of g = h - e as a table; one program per anchor, which draws the anchor's
negatives, reads each candidate's row of the table once, and keeps a running softmax and the running sum of the rows
that it weighs; the mean over the anchors. The sum of the rows is the gradient but for a projection, since the values of
this softmax are its keys: it is finished in the same pass. One launch backward scales it and writes it as the gradients
of h and e. No tensor of candidates, of K negatives per token or of K logits per token exists, and no sum depends on the
order in which programs end: the same inputs give the same bits.

The table is fp16 where h and e have 16 bits. All its elements are at most 1, so fp16 keeps three bits more than bf16,
and half of an fp32 table's bytes, which are what this kernel waits for. Where h or e is fp32 it is fp32: a table of 11
bits would cost more digits than a different layout does. Everything else, the anchor's own vector included, is fp32.

Shape letters: B rows, L places per row, G = B * L places of the grid (row * L + column), T tokens with hidden states, D
hidden, K negatives, A anchors of a program.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.kernels.pairs import PairTable, draw_negatives, load_key, load_others, tabulate_pairs
from pretrain.objectives.taco import SHORTEST, check_sampling, check_temperature

_SHORTEST = tl.constexpr(SHORTEST)
_LOG_2_OF_E = tl.constexpr(1.4426950408889634)
_LOG_OF_2 = tl.constexpr(0.6931471805599453)
_ELEMENTS = 2048  # of a program that only maps elements to elements
_INTERPRETED_ANCHORS = 32  # Triton's interpreter takes its time by the program and hardly by the element


def drawn_contrastive_loss(
    hidden_TD: Tensor,
    embedding_TD: Tensor,
    valid_BL: Tensor,
    segment_BL: Tensor,
    anchor_BL: Tensor,
    key_2: Tensor,
    *,
    window: int,
    num_negatives: int,
    temperature: float,
    place_T: Tensor | None = None,
    token_G: Tensor | None = None,
    own_tokens: range | None = None,
) -> Tensor:
    """The contrastive loss over the pairs that `sample_pairs` draws, without the pairs.

    Args:
        hidden_TD: last encoder layer's output, fp32, bf16 or fp16.
        embedding_TD: the embedding layer's output that the encoder saw; may have another dtype.
        valid_BL: bool, the tokens that may take part.
        segment_BL: integers, the document of each token inside its row.
        anchor_BL: bool, the valid tokens that may be anchors.
        key_2: `pair_key` of the run's seed and the micro-batch.
        place_T: int64, the place of each token; if left out, T is G, and a token has the number of its place.
        token_G: int64, the number of the valid token at each place, what is elsewhere means nothing; with `place_T`.
        own_tokens: numbers of tokens; anchors elsewhere are counted but add nothing. Over ranges that together hold
            all tokens the results and their gradients add up to those without a range.

    Returns:
        fp32, the sum over the anchors in `own_tokens` divided by the number of all anchors; 0 without any.

    Raises:
        ConfigError: fewer than two rows.
        ValueError: wrong shapes, dtypes or ranges. Nothing is read back from the device.
    """
    check_sampling(valid_BL, window, num_negatives, 0, 0, segment_BL)
    check_temperature(temperature)
    _check_tensors(hidden_TD, embedding_TD, valid_BL, anchor_BL, place_T, token_G)
    table = tabulate_pairs(valid_BL, segment_BL, key_2, window=window, token_G=token_G)
    loss: Tensor = _DrawnContrast.apply(
        hidden_TD,
        embedding_TD,
        anchor_BL,
        place_T,
        table,
        num_negatives,
        temperature,
        range(len(hidden_TD)) if own_tokens is None else own_tokens,
        torch.is_grad_enabled() and (hidden_TD.requires_grad or embedding_TD.requires_grad),
    )
    return loss


class _DrawnContrast(torch.autograd.Function):
    """The loss and, in the same pass, the gradient of g, which is not divided by the number of anchors yet."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        embedding_TD: Tensor,
        anchor_BL: Tensor,
        place_T: Tensor | None,
        table: PairTable,
        num_negatives: int,
        temperature: float,
        own_tokens: range,
        needs_gradient: bool,
    ) -> Tensor:
        ctx.dtypes = hidden_TD.dtype, embedding_TD.dtype
        hidden_TD, embedding_TD = hidden_TD.contiguous(), embedding_TD.contiguous()
        num_rows, length = anchor_BL.shape
        num_tokens, size = hidden_TD.shape
        block = triton.next_power_of_2(size)
        has_16_bits = all(dtype.itemsize == 2 for dtype in ctx.dtypes)
        unit_TD = hidden_TD.new_empty(num_tokens, size, dtype=torch.float16 if has_16_bits else torch.float32)
        num_vectors = max(1, _ELEMENTS // block)
        _unit_kernel[(triton.cdiv(num_tokens, num_vectors),)](
            hidden_TD, embedding_TD, unit_TD, num_tokens, SIZE=size, VECTORS=num_vectors, BLOCK=block
        )
        # Each aligned to 16 bytes, whatever T is.
        loss_T, is_anchor_T = (hidden_TD.new_empty(num_tokens, dtype=torch.float32) for _ in range(2))
        gradient_TD = hidden_TD.new_empty(num_tokens if needs_gradient else 0, size, dtype=torch.float32)
        num_anchors = 1 if hidden_TD.is_cuda else _INTERPRETED_ANCHORS
        _contrast_kernel[(triton.cdiv(num_tokens, num_anchors),)](
            hidden_TD,
            embedding_TD,
            unit_TD,
            anchor_BL.contiguous().view(torch.uint8),
            place_T,
            *table,
            loss_T,
            is_anchor_T,
            gradient_TD,
            num_tokens,
            num_rows,
            own_tokens.start,
            own_tokens.stop,
            1 / temperature,
            LENGTH=length,
            NUM_NEGATIVES=num_negatives,
            SIZE=size,
            ANCHORS=num_anchors,
            BLOCK=block,
            NEEDS_GRADIENT=needs_gradient,
            num_warps=max(1, min(8, block // 1024)),
        )
        mean_2 = loss_T.new_empty(2)
        _mean_kernel[(1,)](loss_T, is_anchor_T, mean_2, num_tokens, BLOCK=_ELEMENTS, num_warps=8)
        ctx.save_for_backward(gradient_TD, mean_2)
        return mean_2[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradient_TD, mean_2 = ctx.saved_tensors
        grad_hidden_TD, grad_embedding_TD = (torch.empty_like(gradient_TD, dtype=dtype) for dtype in ctx.dtypes)
        num_elements = gradient_TD.numel()
        _scale_kernel[(triton.cdiv(num_elements, _ELEMENTS),)](
            gradient_TD, mean_2, grad_loss, grad_hidden_TD, grad_embedding_TD, num_elements, BLOCK=_ELEMENTS
        )
        return grad_hidden_TD, grad_embedding_TD, None, None, None, None, None, None, None


def _check_tensors(
    hidden_TD: Tensor,
    embedding_TD: Tensor,
    valid_BL: Tensor,
    anchor_BL: Tensor,
    place_T: Tensor | None,
    token_G: Tensor | None,
) -> None:
    num_places = valid_BL.numel()
    if (place_T is None) != (token_G is None) or (token_G is not None and token_G.shape != (num_places,)):
        raise ValueError(f"place_T and token_G must both be left out, or be [T] and [{num_places}]")
    num_tokens = num_places if place_T is None else len(place_T)
    for name, tensor in (("hidden_TD", hidden_TD), ("embedding_TD", embedding_TD)):
        if tensor.dim() != 2 or len(tensor) != num_tokens or tensor.shape != hidden_TD.shape:
            raise ValueError(f"{name} must be [{num_tokens}, D], one D for both, found {list(tensor.shape)}")
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} must be fp32, bf16 or fp16, found {tensor.dtype}")
    if anchor_BL.shape != valid_BL.shape or anchor_BL.dtype != torch.bool:
        raise ValueError(f"anchor_BL must be bool {list(valid_BL.shape)}, found {anchor_BL.dtype} {[*anchor_BL.shape]}")


# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def _load_unit(hidden, embedding, element_ND, is_read_ND):
    """Unit vectors of g, and 1 / |g|; both 0 for a g that has no direction."""
    hidden_ND = tl.load(hidden + element_ND, mask=is_read_ND, other=0).to(tl.float32)
    semantics_ND = hidden_ND - tl.load(embedding + element_ND, mask=is_read_ND, other=0).to(tl.float32)
    norm_N = tl.sqrt(tl.sum(semantics_ND * semantics_ND, 1))
    inverse_norm_N = tl.where(norm_N > _SHORTEST, 1 / tl.maximum(norm_N, _SHORTEST), 0.0)
    return semantics_ND * inverse_norm_N[:, None], inverse_norm_N


# T differs from micro-batch to micro-batch: no kernel of its own for one that 16 divides.
@triton.jit(do_not_specialize=["num_tokens"])
def _unit_kernel(hidden, embedding, unit, num_tokens, SIZE: tl.constexpr, VECTORS: tl.constexpr, BLOCK: tl.constexpr):
    """Some tokens: their rows of the table."""
    token_N = tl.program_id(0) * VECTORS + tl.arange(0, VECTORS)
    feature_D = tl.arange(0, BLOCK)
    element_ND = token_N.to(tl.int64)[:, None] * SIZE + feature_D[None, :]
    is_inside_ND = (token_N < num_tokens)[:, None] & (feature_D < SIZE)[None, :]
    unit_ND, _ = _load_unit(hidden, embedding, element_ND, is_inside_ND)
    tl.store(unit + element_ND, unit_ND.to(unit.dtype.element_ty), mask=is_inside_ND)


@triton.jit
def _load_rows(unit, token_A, feature_D, is_read_AD, SIZE: tl.constexpr):
    """Rows of the table, fp32 [A, D]; 0 where they are not to be read."""
    element_AD = token_A.to(tl.int64)[:, None] * SIZE + feature_D[None, :]
    return tl.load(unit + element_AD, mask=is_read_AD, other=0).to(tl.float32)


@triton.jit(do_not_specialize=["num_tokens", "own_first", "own_end"])
def _contrast_kernel(
    hidden,
    embedding,
    unit,
    anchor,
    places,
    positive,
    listed,
    before,
    key,
    loss,
    is_anchor,
    gradient,
    num_tokens,
    num_rows,
    own_first,
    own_end,
    inverse_temperature,
    LENGTH: tl.constexpr,
    NUM_NEGATIVES: tl.constexpr,
    SIZE: tl.constexpr,
    ANCHORS: tl.constexpr,
    BLOCK: tl.constexpr,
    NEEDS_GRADIENT: tl.constexpr,
):
    """Some anchors (one, on a GPU): the loss of each, -log softmax[positive], and its gradient by g."""
    token_A = tl.program_id(0) * ANCHORS + tl.arange(0, ANCHORS)
    is_token_A = token_A < num_tokens
    place_A = token_A
    if places is not None:
        place_A = tl.load(places + token_A, mask=is_token_A, other=0).to(tl.int32)
    positive_A = tl.load(positive + place_A, mask=is_token_A, other=-1)
    row_A = tl.where(is_token_A, place_A // LENGTH, 0)
    num_before_A, num_own_A, num_others_A = load_others(before, row_A, num_rows)
    is_wanted_A = tl.load(anchor + place_A, mask=is_token_A, other=0) != 0
    is_anchor_A = is_wanted_A & (positive_A >= 0) & (num_others_A > 0)
    tl.store(is_anchor + token_A, is_anchor_A.to(tl.float32), mask=is_token_A)
    is_own_A = is_anchor_A & (token_A >= own_first) & (token_A < own_end)
    feature_D = tl.arange(0, BLOCK)
    is_feature_D = feature_D < SIZE
    element_AD = token_A.to(tl.int64)[:, None] * SIZE + feature_D[None, :]
    is_inside_AD = is_token_A[:, None] & is_feature_D[None, :]
    loss_A = tl.zeros([ANCHORS], tl.float32)
    pull_AD = tl.zeros([ANCHORS, BLOCK], tl.float32)
    if tl.sum(is_own_A.to(tl.int32), 0) > 0:
        is_read_AD = is_own_A[:, None] & is_feature_D[None, :]
        unit_AD, inverse_norm_A = _load_unit(hidden, embedding, element_AD, is_read_AD)
        # Logits to base 2, whose powers a GPU has.
        scale = inverse_temperature * _LOG_2_OF_E
        row_AD = _load_rows(unit, positive_A, feature_D, is_read_AD, SIZE)
        positive_logit_A = tl.sum(unit_AD * row_AD, 1) * scale
        largest_A = positive_logit_A
        total_A = tl.full([ANCHORS], 1.0, tl.float32)
        sum_AD = row_AD
        words = load_key(key)
        a_A, b_A, c_A, d_A = draw_negatives(words, listed, place_A, 0, num_before_A, num_own_A, num_others_A, is_own_A)
        for block in range(0, (NUM_NEGATIVES + 3) // 4):
            # K need not be a multiple of four, and a row that does not count might hold a NaN.
            has_b, has_c, has_d = (
                (4 * block + 1 < NUM_NEGATIVES),
                (4 * block + 2 < NUM_NEGATIVES),
                (4 * block + 3 < NUM_NEGATIVES),
            )
            a_AD = _load_rows(unit, a_A, feature_D, is_read_AD, SIZE)
            b_AD = _load_rows(unit, b_A, feature_D, is_read_AD & has_b, SIZE)
            c_AD = _load_rows(unit, c_A, feature_D, is_read_AD & has_c, SIZE)
            d_AD = _load_rows(unit, d_A, feature_D, is_read_AD & has_d, SIZE)
            # While these are on their way, the next four are drawn.
            a_A, b_A, c_A, d_A = draw_negatives(
                words, listed, place_A, block + 1, num_before_A, num_own_A, num_others_A, is_own_A
            )
            a_logit_A = tl.sum(unit_AD * a_AD, 1) * scale
            b_logit_A = tl.where(has_b, tl.sum(unit_AD * b_AD, 1) * scale, float("-inf"))
            c_logit_A = tl.where(has_c, tl.sum(unit_AD * c_AD, 1) * scale, float("-inf"))
            d_logit_A = tl.where(has_d, tl.sum(unit_AD * d_AD, 1) * scale, float("-inf"))
            new_A = tl.maximum(tl.maximum(a_logit_A, b_logit_A), tl.maximum(c_logit_A, d_logit_A))
            new_A = tl.maximum(new_A, largest_A)
            shrink_A = tl.exp2(largest_A - new_A)
            a_share_A, b_share_A = tl.exp2(a_logit_A - new_A), tl.exp2(b_logit_A - new_A)
            c_share_A, d_share_A = tl.exp2(c_logit_A - new_A), tl.exp2(d_logit_A - new_A)
            total_A = total_A * shrink_A + ((a_share_A + b_share_A) + (c_share_A + d_share_A))
            if NEEDS_GRADIENT:
                sum_AD = sum_AD * shrink_A[:, None] + a_AD * a_share_A[:, None] + b_AD * b_share_A[:, None]
                sum_AD = sum_AD + c_AD * c_share_A[:, None] + d_AD * d_share_A[:, None]
            largest_A = new_A
        loss_A = (largest_A + tl.log2(total_A) - positive_logit_A) * _LOG_OF_2
        if NEEDS_GRADIENT:
            # Read again rather than kept in registers meanwhile.
            row_AD = _load_rows(unit, positive_A, feature_D, is_read_AD, SIZE)
            pull_AD = (sum_AD / total_A[:, None] - row_AD) * inverse_temperature
            # Normalising g removes what points along g itself.
            pull_AD = (pull_AD - unit_AD * tl.sum(unit_AD * pull_AD, 1)[:, None]) * inverse_norm_A[:, None]
    tl.store(loss + token_A, tl.where(is_own_A, loss_A, 0.0), mask=is_token_A)
    if NEEDS_GRADIENT:
        tl.store(gradient + element_AD, tl.where(is_own_A[:, None], pull_AD, 0.0), mask=is_inside_AD)


@triton.jit(do_not_specialize=["num_tokens"])
def _mean_kernel(loss, is_anchor, mean, num_tokens, BLOCK: tl.constexpr):
    """The loss over the anchors, and 1 / their number (1 without any): one program, so always in the same order."""
    lane = tl.arange(0, BLOCK)
    loss_N = tl.zeros([BLOCK], tl.float32)
    count_N = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_tokens, BLOCK):
        is_inside_N = first + lane < num_tokens
        loss_N += tl.load(loss + first + lane, mask=is_inside_N, other=0)
        count_N += tl.load(is_anchor + first + lane, mask=is_inside_N, other=0)
    weight = 1 / tl.maximum(tl.sum(count_N, 0), 1.0)
    tl.store(mean, tl.sum(loss_N, 0) * weight)
    tl.store(mean + 1, weight)


@triton.jit
def _scale_kernel(gradient, mean, grad_loss, grad_hidden, grad_embedding, num_elements, BLOCK: tl.constexpr):
    place_N = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_inside_N = place_N < num_elements
    gradient_N = tl.load(gradient + place_N, mask=is_inside_N, other=0)
    gradient_N *= tl.load(mean + 1) * tl.load(grad_loss).to(tl.float32)
    tl.store(grad_hidden + place_N, gradient_N.to(grad_hidden.dtype.element_ty), mask=is_inside_N)
    tl.store(grad_embedding + place_N, (-gradient_N).to(grad_embedding.dtype.element_ty), mask=is_inside_N)
