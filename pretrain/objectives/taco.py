"""TACO's token contrastive loss (Fu et al. 2022): how pairs are sampled, and the loss over them.

Sits between the encoder's output and the total loss: `sample_pairs` draws one positive and K negatives for every token
of a micro-batch, `token_contrastive_loss` compares them by the cosine of their global semantics g = h - e.

Shape letters: B rows, L tokens per row, D hidden, K negatives, C = 1 + K candidates, T = B * L tokens, A anchors.
A token's flat index is row * L + column.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.errors import ConfigError
from pretrain.objectives.philox import Words, philox_4x32, split_words, uniform_below

Anchors = Literal["all", "masked", "unmasked"]

NO_TOKEN = -1
"""Marks a positive or negative that does not exist."""

SHORTEST = 1e-8
"""A global semantics vector below this norm has no direction: its cosines and its gradient are 0."""

# Separates the words drawn here from those that the data order and the masks draw with the same seed.
PAIR_DOMAIN = 0x5441434F
_NO_GROUP = torch.iinfo(torch.int64).max


# -- pairs -------------------------------------------------------------------------------------------------------------


def sample_pairs(
    valid_BL: Tensor,
    *,
    window: int,
    num_negatives: int,
    seed: int,
    micro_batch_index: int,
    segment_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One positive and `num_negatives` negatives for every valid token: a pure function of the arguments.

    The positive is the token at an offset drawn uniformly from -window..-1, 1..window; if that leaves the row (or, with
    `segment_BL`, the document) or hits an invalid token, it is another valid token of the row (or document), drawn
    uniformly. Negatives are drawn uniformly, with replacement, from the valid tokens of all other rows.

    Args:
        valid_BL: bool, the tokens that may take part.
        seed: the seed of the run, 0 .. 2^64 - 1.
        micro_batch_index: 0 .. 2^64 - 1, number of the micro-batch in the run, over all data-parallel ranks.
        segment_BL: integers, the document of each token inside its row; empty when a row is one document.

    Returns:
        positive_BL: int64, a column of the same row; -1 for an invalid token or the only valid one of its document.
        negative_BLK: int64, flat indices row * L + column; -1 for an invalid token or if no other row has a valid one.

    Raises:
        ConfigError: fewer than two rows.
        ValueError: a wrong shape, dtype or range. Nothing is read back from the device.
    """
    check_sampling(valid_BL, window, num_negatives, seed, micro_batch_index, segment_BL)
    with torch.no_grad():
        num_blocks = 1 + -(-num_negatives // 4)  # four words each; the first block is the positive's
        words = _draw(valid_BL, num_blocks, seed, micro_batch_index)
        positive_BL = _positives(valid_BL, segment_BL, words[0][..., 0], words[1][..., 0], window)
        word_BLK = torch.stack(words, dim=-1)[:, :, 1:].flatten(2)[..., :num_negatives]
        return positive_BL, _negatives(valid_BL, word_BLK)


def _draw(valid_BL: Tensor, num_blocks: int, seed: int, micro_batch_index: int) -> Words:
    """Four words [B, L, num_blocks] each, counted by (flat token, block, micro-batch)."""
    num_rows, length = valid_BL.shape
    device = valid_BL.device
    token_BL1 = torch.arange(num_rows * length, device=device).view(num_rows, length, 1)
    # `full` and not `tensor`: it fills on the device; a copy from the host would wait for the GPU.
    low, high = (torch.full((1,), word, device=device) for word in split_words(micro_batch_index))
    key_low, key_high = split_words(seed)
    counter = (token_BL1, torch.arange(num_blocks, device=device), low, high)
    return philox_4x32(counter, (key_low, key_high ^ PAIR_DOMAIN))


def _positives(
    valid_BL: Tensor, segment_BL: Tensor | None, offset_word_BL: Tensor, fallback_word_BL: Tensor, window: int
) -> Tensor:
    length = valid_BL.shape[1]
    segment = torch.zeros_like(valid_BL, dtype=torch.int64) if segment_BL is None else segment_BL.long()
    group_BL = segment.masked_fill(~valid_BL, _NO_GROUP)
    draw_BL = uniform_below(offset_word_BL, 2 * window)
    offset_BL = draw_BL - window + (draw_BL >= window)
    column_BL = torch.arange(length, device=valid_BL.device) + offset_BL
    inside_BL = column_BL.clamp(0, length - 1)
    fits_BL = (inside_BL == column_BL) & (group_BL.gather(1, inside_BL) == group_BL)
    other_BL, has_other_BL = _other_of_group(group_BL, fallback_word_BL)
    positive_BL = torch.where(fits_BL, inside_BL, other_BL)
    return positive_BL.masked_fill(~(valid_BL & has_other_BL), NO_TOKEN)


def _other_of_group(group_BL: Tensor, word_BL: Tensor) -> tuple[Tensor, Tensor]:
    """For every token the column of another token of its row and group, drawn uniformly, and whether there is one."""
    length = group_BL.shape[1]
    sorted_BL, column_BL = group_BL.sort(dim=1, stable=True)
    place_BL = column_BL.argsort(dim=1)
    start_BL = torch.searchsorted(sorted_BL, group_BL)
    num_others_BL = torch.searchsorted(sorted_BL, group_BL, right=True) - start_BL - 1
    draw_BL = uniform_below(word_BL, num_others_BL)
    draw_BL = start_BL + draw_BL + (draw_BL >= place_BL - start_BL)  # skips the token itself
    return column_BL.gather(1, draw_BL.clamp(max=length - 1)), num_others_BL > 0


def _negatives(valid_BL: Tensor, word_BLK: Tensor) -> Tensor:
    count_B = valid_BL.sum(dim=1)
    first_B = count_B.cumsum(0) - count_B
    num_others_B11 = (count_B.sum() - count_B)[:, None, None]
    # Valid tokens first, in flat order: those of one row are neighbours, and the draw skips the token's own row.
    token_T = (~valid_BL).flatten().to(torch.uint8).argsort(stable=True)
    draw_BLK = uniform_below(word_BLK, num_others_B11)
    draw_BLK = draw_BLK + (draw_BLK >= first_B[:, None, None]) * count_B[:, None, None]
    negative_BLK = token_T.take(draw_BLK)
    return negative_BLK.masked_fill(~(valid_BL[..., None] & (num_others_B11 > 0)), NO_TOKEN)


def anchor_mask(anchors: Anchors, masked_BL: Tensor, valid_BL: Tensor) -> Tensor:
    """Which valid tokens are anchors, relative to the positions masked for language modelling; bool [B, L]."""
    if anchors == "all":
        return valid_BL
    if anchors == "masked":
        return valid_BL & masked_BL
    if anchors == "unmasked":
        return valid_BL & ~masked_BL
    raise ConfigError(f"objective.anchors must be all, masked or unmasked, found {anchors!r}")


# -- loss --------------------------------------------------------------------------------------------------------------


def token_contrastive_loss(
    hidden_BLD: Tensor,
    embedding_BLD: Tensor,
    positive_BL: Tensor,
    negative_BLK: Tensor,
    *,
    temperature: float,
    anchor_mask_BL: Tensor | None = None,
) -> Tensor:
    """Mean over anchors of -log softmax([cos(a, positive), cos(a, negative_1..K)] / temperature)[positive].

    A token is an anchor if its positive and negatives exist (>= 0) and `anchor_mask_BL`, if given, is True there.
    Vectors are g = hidden - embedding. Positives and negatives are constants: the gradient flows through the anchor
    into hidden and, negated, into embedding. Computed in fp32 (fp64 stays fp64), also under autocast. Without any
    anchor the loss and both gradients are 0.

    Args:
        hidden_BLD: last encoder layer's output.
        embedding_BLD: the embedding layer's output that the encoder saw.
        positive_BL: int64, column of the same row.
        negative_BLK: int64, flat indices row * L + column.
        anchor_mask_BL: bool.

    Returns:
        A scalar.

    Raises:
        ValueError: wrong shapes or dtypes, or a temperature that is not positive.
    """
    _check_loss(hidden_BLD, embedding_BLD, positive_BL, negative_BLK, temperature, anchor_mask_BL)
    num_rows, length, size = hidden_BLD.shape
    is_anchor_BL = has_pairs(positive_BL, negative_BLK)
    is_anchor_T = (is_anchor_BL if anchor_mask_BL is None else is_anchor_BL & anchor_mask_BL).flatten()
    first_B1 = torch.arange(num_rows, device=positive_BL.device)[:, None] * length
    candidate_TC = torch.cat([(first_B1 + positive_BL)[..., None], negative_BLK], dim=-1).flatten(0, 1)
    loss: Tensor = _ContrastiveLoss.apply(
        hidden_BLD.reshape(-1, size),
        embedding_BLD.reshape(-1, size),
        is_anchor_T,
        candidate_TC,
        temperature,
        torch.is_grad_enabled() and (hidden_BLD.requires_grad or embedding_BLD.requires_grad),
    )
    return loss


def has_pairs(positive_BL: Tensor, negative_BLK: Tensor) -> Tensor:
    """Bool [B, L]: the tokens whose positive and negatives exist."""
    return (positive_BL >= 0) & (negative_BLK >= 0).all(dim=-1)


class _ContrastiveLoss(torch.autograd.Function):
    """The loss and, since its derivative has a closed form, the gradient of g in the same forward pass.

    No [A, C, D] tensor of gathered candidates ever exists: `embedding_bag` sums weighted rows of a table as it reads
    them, and its derivative by the weights is the dot product of the anchor with each row. In relative time at
    16 x 256 x 512, K = 50 on two threads, this takes 1.0; gathering chunk by chunk (best chunk) 2.1 with
    multiply-and-sum and 4.6 with bmm; multiplying each chunk of anchors with all tokens 12, or 6.6 with
    `embedding_bag` for the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        embedding_TD: Tensor,
        is_anchor_T: Tensor,
        candidate_TC: Tensor,
        temperature: float,
        needs_gradient: bool,
    ) -> Tensor:
        ctx.dtypes = hidden_TD.dtype, embedding_TD.dtype
        dtype = torch.promote_types(torch.promote_types(*ctx.dtypes), torch.float32)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            unit_TD = hidden_TD.to(dtype) - embedding_TD.to(dtype)
            inverse_norm_T1 = _inverse_norm(unit_TD)
            unit_TD.mul_(inverse_norm_T1)
            anchor_A = _anchors_to_visit(is_anchor_T)
            # index_select: a third of the time of indexing with brackets.
            candidate_AC = candidate_TC.index_select(0, anchor_A).clamp_(min=0)
            is_anchor_A = is_anchor_T.index_select(0, anchor_A)
            weight_A = is_anchor_A / is_anchor_A.sum().clamp(min=1).to(dtype)
            unit_AD = unit_TD.index_select(0, anchor_A)
            logit_AC = _dot_products(unit_AD, unit_TD, candidate_AC).div_(temperature)
            loss = ((logit_AC.logsumexp(dim=-1) - logit_AC[:, 0]) * weight_A).sum()
            if needs_gradient:
                slope_AC = logit_AC.softmax(dim=-1)
                slope_AC[:, 0] -= 1
                slope_AC.mul_((weight_A / temperature)[:, None])
                pull_AD = F.embedding_bag(candidate_AC, unit_TD, mode="sum", per_sample_weights=slope_AC)
                # Normalising g removes what points along g itself.
                pull_AD -= unit_AD * (unit_AD * pull_AD).sum(dim=-1, keepdim=True)
                pull_AD.mul_(inverse_norm_T1.index_select(0, anchor_A))
                ctx.save_for_backward(unit_TD.zero_().index_copy_(0, anchor_A, pull_AD))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_TD,) = ctx.saved_tensors
        hidden_dtype, embedding_dtype = ctx.dtypes
        gradient_TD = gradient_TD * grad_loss
        return gradient_TD.to(hidden_dtype), -gradient_TD.to(embedding_dtype), None, None, None, None


def _inverse_norm(vector_TD: Tensor) -> Tensor:
    norm_T1 = torch.linalg.vector_norm(vector_TD, dim=-1, keepdim=True)
    return torch.where(norm_T1 > SHORTEST, 1 / norm_T1, 0)


def _anchors_to_visit(is_anchor_T: Tensor) -> Tensor:
    """Flat indices of the anchors; on a GPU of all tokens, since counting the anchors would wait for it."""
    if is_anchor_T.device.type == "cpu":
        return is_anchor_T.nonzero()[:, 0]
    return torch.arange(len(is_anchor_T), device=is_anchor_T.device)


def _dot_products(vector_AD: Tensor, table_TD: Tensor, row_AC: Tensor) -> Tensor:
    """vector_AD[a] . table_TD[row_AC[a, c]] for all a, c, [A, C]."""
    num_anchors, num_candidates = row_AC.shape
    # The gradient of embedding_bag by its weights is this product, row by row and without a gathered tensor. Called
    # directly: torch.autograd.grad would load sympy, a second at every start, to compare two shapes.
    anchor_A = torch.arange(num_anchors, device=row_AC.device)
    product_N: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(  # noqa: SLF001  # no public name
        vector_AD,
        table_TD,
        row_AC.reshape(-1),
        anchor_A * num_candidates,
        anchor_A.repeat_interleave(num_candidates),
        0,  # mode "sum"
    )
    return product_N.view(num_anchors, num_candidates)


# -- checks ------------------------------------------------------------------------------------------------------------


def check_sampling(
    valid_BL: Tensor, window: int, num_negatives: int, seed: int, micro_batch_index: int, segment_BL: Tensor | None
) -> None:
    """Raises what `sample_pairs` says it raises."""
    if valid_BL.dim() != 2 or valid_BL.dtype != torch.bool:
        raise ValueError(f"valid_BL must be bool [B, L], found {valid_BL.dtype} {list(valid_BL.shape)}")
    if valid_BL.shape[0] < 2:
        raise ConfigError(
            f"micro_batch_size ({valid_BL.shape[0]}) must be at least 2: negatives are drawn from the other rows of "
            "the micro-batch; raise train.micro_batch_size, or set objective.contrastive_weight=0"
        )
    for name, value, low, high in (
        ("window", window, 1, 2**30),
        ("num_negatives", num_negatives, 1, 2**31),
        ("seed", seed, 0, 2**64),
        ("micro_batch_index", micro_batch_index, 0, 2**64),
    ):
        if not low <= value < high:
            raise ValueError(f"{name} must be at least {low} and below {high}, found {value}")
    if segment_BL is not None and (segment_BL.shape != valid_BL.shape or segment_BL.dtype.is_floating_point):
        raise ValueError(
            f"segment_BL must be integers {list(valid_BL.shape)}, found {segment_BL.dtype} {list(segment_BL.shape)}"
        )


def _check_loss(
    hidden_BLD: Tensor,
    embedding_BLD: Tensor,
    positive_BL: Tensor,
    negative_BLK: Tensor,
    temperature: float,
    anchor_mask_BL: Tensor | None,
) -> None:
    if hidden_BLD.dim() != 3 or embedding_BLD.shape != hidden_BLD.shape:
        raise ValueError(
            f"hidden_BLD and embedding_BLD must share one shape [B, L, D], found {list(hidden_BLD.shape)} and "
            f"{list(embedding_BLD.shape)}"
        )
    rows = hidden_BLD.shape[:2]
    if positive_BL.shape != rows or negative_BLK.shape[:2] != rows or negative_BLK.dim() != 3:
        raise ValueError(
            f"positive_BL must be {list(rows)} and negative_BLK {[*rows, 'K']}, found {list(positive_BL.shape)} and "
            f"{list(negative_BLK.shape)}"
        )
    if positive_BL.dtype != torch.int64 or negative_BLK.dtype != torch.int64:
        raise ValueError(f"positives and negatives must be int64, found {positive_BL.dtype} and {negative_BLK.dtype}")
    if anchor_mask_BL is not None and (anchor_mask_BL.shape != rows or anchor_mask_BL.dtype != torch.bool):
        raise ValueError(
            f"anchor_mask_BL must be bool {list(rows)}, found {anchor_mask_BL.dtype} {list(anchor_mask_BL.shape)}"
        )
    check_temperature(temperature)


def check_temperature(temperature: float) -> None:
    """Raises ValueError for a temperature that is not positive."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, found {temperature}")
