"""Masked language modelling (Devlin et al. 2019): cross-entropy and accuracy over the masked positions.

Takes the vocabulary logits of the masked positions only. Shape letters: M masked positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED_LABEL = -100

# Bytes of fp32 work space for one slice of rows: small enough for a CPU's cache, large enough to keep a GPU busy.
_CPU_SLICE_BYTES = 4 << 20
_GPU_SLICE_BYTES = 256 << 20


@dataclass(frozen=True)
class VocabularyShard:
    """The words whose logits this rank has: those from `first` on; other ranks of `group` have the others."""

    first: int
    group: distributed.ProcessGroup


def masked_lm_loss(
    logits_MV: Tensor,
    label_M: Tensor,
    shard: VocabularyShard | None = None,
    *,
    bias_V: Tensor | None = None,
    num_words: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy in fp32 over the labels that are not -100, and how often the top prediction is correct.

    With `shard` the logits cover this rank's words only, and one small collective extends the loss to all words; labels
    remain ids of the whole vocabulary.

    Backward writes the gradient of the logits over the logits, which must not be needed any more, and so runs once. A
    leaf of the graph, given without `bias_V`, keeps its values.

    Args:
        bias_V: added to the logits here, in a pass that is made anyway. The logits' memory is then used up: they must
            not be read after this call either.
        num_words: the first columns, which stand for words; the others get a gradient of 0. Default: all.

    Returns:
        loss: scalar, 0 with zero gradient if there is no label.
        num_correct, num_labels: int64 scalars, without gradient. Of equal logits the first is the prediction.

    Raises:
        ValueError: shapes that do not fit.
        RuntimeError: a second backward.
    """
    num_words = check_shapes(logits_MV, label_M, bias_V, num_words)
    loss, num_correct, num_labels = _MaskedCrossEntropy.apply(logits_MV, bias_V, label_M, shard, num_words)
    return loss, num_correct, num_labels


def check_shapes(logits_MV: Tensor, label_M: Tensor, bias_V: Tensor | None, num_words: int | None) -> int:
    """The number of columns that stand for words.

    Raises:
        ValueError: shapes that do not fit.
    """
    if logits_MV.dim() != 2 or label_M.shape != logits_MV.shape[:1]:
        raise ValueError(f"expected logits [M, V] and labels [M], found {list(logits_MV.shape)}, {list(label_M.shape)}")
    num_columns = logits_MV.shape[1]
    if bias_V is not None and bias_V.shape != (num_columns,):
        raise ValueError(f"expected a bias [{num_columns}] for logits [M, {num_columns}], found {list(bias_V.shape)}")
    if num_words is not None and not 0 <= num_words <= num_columns:
        raise ValueError(f"expected 0 to {num_columns} words for logits [M, {num_columns}], found {num_words}")
    return num_columns if num_words is None else num_words


class _MaskedCrossEntropy(torch.autograd.Function):
    """Cross-entropy that keeps nothing of size [M, V] besides the logits, and puts their gradient in their place.

    torch's own saves a second [M, V] of log-probabilities, in fp32 under bf16, creates a third for the gradient, and
    needs a further pass for accuracy.

    Where the logits may be used up in the forward pass, and have the dtype of the sums, they hold exp(logit - largest
    logit of the row) afterwards, so backward need not compute it again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_MV: Tensor,
        bias_V: Tensor | None,
        label_M: Tensor,
        shard: VocabularyShard | None,
        num_words: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(logits_MV.dtype, torch.float32)
        is_label_M = label_M != IGNORED_LABEL
        column_M = label_M if shard is None else label_M - shard.first
        is_here_M = (column_M >= 0) & (column_M < num_words) & is_label_M
        target_M = column_M.where(is_here_M, 0)
        total_M, picked_M = (torch.zeros(len(label_M), dtype=dtype, device=logits_MV.device) for _ in "12")
        best_logit_M, best_M = torch.full_like(total_M, -torch.inf), torch.zeros_like(label_M)
        ctx.has_powers = bias_V is not None and logits_MV.dtype == dtype
        word_logits_MV = logits_MV[:, :num_words]
        for rows in _slices(word_logits_MV):
            slice_MV = _with_bias(word_logits_MV[rows], bias_V, dtype, in_place=ctx.has_powers)
            best_logit_M[rows], best_M[rows] = slice_MV.max(dim=-1)
            picked_M[rows] = slice_MV.gather(1, target_M[rows, None])[:, 0]
            total_M[rows] = slice_MV.sub_(best_logit_M[rows, None]).exp_().sum(dim=-1)
        log_total_M, picked_M = total_M.log() + best_logit_M, picked_M.where(is_here_M, 0)
        num_labels = is_label_M.sum()
        weight_M = is_label_M / num_labels.clamp(min=1).to(dtype)
        if shard is not None:
            log_total_M, picked_M, best_M = over_all_words(log_total_M, picked_M, best_logit_M, best_M, shard)
        loss = ((log_total_M - picked_M) * weight_M).sum()
        num_correct = ((best_M == label_M) & is_label_M).sum()
        saved_bias_V = None if bias_V is None or ctx.has_powers else bias_V
        ctx.save_for_backward(logits_MV, saved_bias_V, target_M, is_here_M, best_logit_M, log_total_M, weight_M)
        ctx.num_words, ctx.is_spent = num_words, False
        ctx.bias_dtype = None if bias_V is None else bias_V.dtype
        ctx.keeps_logits = logits_MV.is_leaf and bias_V is None
        ctx.mark_non_differentiable(num_correct, num_labels)
        return loss, num_correct, num_labels

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor, Tensor | None, None, None, None]:
        spend(ctx)
        logits_MV, bias_V, target_M, is_here_M, best_logit_M, log_total_M, weight_M = ctx.saved_tensors
        scale_M1 = (weight_M * grad_loss)[:, None]
        step_M1 = -scale_M1 * is_here_M[:, None]
        factor_M1 = scale_M1 * (best_logit_M - log_total_M).exp()[:, None]
        gradient_MV = torch.empty_like(logits_MV) if ctx.keeps_logits else logits_MV
        word_gradient_MV, num_words = gradient_MV[:, : ctx.num_words], ctx.num_words
        bias_gradient_V = None if ctx.bias_dtype is None else log_total_M.new_zeros(logits_MV.shape[1])
        for rows in _slices(word_gradient_MV):
            slice_MV = logits_MV[rows, :num_words]
            if not ctx.has_powers:
                slice_MV = _with_bias(slice_MV, bias_V, log_total_M.dtype, in_place=False)
                slice_MV.sub_(best_logit_M[rows, None]).exp_()
            slice_MV.mul_(factor_M1[rows]).scatter_add_(1, target_M[rows, None], step_M1[rows])
            if slice_MV.data_ptr() != word_gradient_MV[rows].data_ptr():
                word_gradient_MV[rows] = slice_MV
            if bias_gradient_V is not None:
                bias_gradient_V[:num_words] += slice_MV.sum(dim=0)
        gradient_MV[:, num_words:] = 0
        return gradient_MV, None if bias_gradient_V is None else bias_gradient_V.to(ctx.bias_dtype), None, None, None


def spend(ctx: Any) -> None:
    """Refuse a second backward of a loss whose logits hold their gradient by now.

    Raises:
        RuntimeError: it is the second one.
    """
    if ctx.is_spent:
        raise RuntimeError(
            "masked_lm_loss: after a backward the memory of the logits holds their gradient, so there is no second; "
            "compute the loss again"
        )
    ctx.is_spent = not ctx.keeps_logits


def _with_bias(slice_MV: Tensor, bias_V: Tensor | None, dtype: torch.dtype, *, in_place: bool) -> Tensor:
    """The logits of some rows with their bias, in a copy or in the logits' own memory."""
    if not in_place:
        slice_MV = slice_MV.to(dtype, copy=True)
    return slice_MV if bias_V is None else slice_MV.add_(bias_V[: slice_MV.shape[1]])


def over_all_words(
    log_total_M: Tensor, picked_M: Tensor, best_logit_M: Tensor, best_M: Tensor, shard: VocabularyShard
) -> tuple[Tensor, Tensor, Tensor]:
    """Over all ranks' words: log-sum-exp, the label's logit (given as 0 where another rank has it), the best word."""
    parts = (log_total_M, picked_M, best_logit_M, best_M + shard.first)
    local_4M = torch.stack([part.double() for part in parts])
    num_ranks = distributed.get_world_size(shard.group)
    all_XM = local_4M.new_empty(num_ranks * len(parts), len(best_M))
    distributed.all_gather_into_tensor(all_XM, local_4M, group=shard.group)
    log_total_RM, picked_RM, best_logit_RM, best_RM = all_XM.view(num_ranks, len(parts), -1).unbind(dim=1)
    best_rank_1M = best_logit_RM.argmax(dim=0, keepdim=True)  # the first of equal ones, as within a rank
    return (
        log_total_RM.logsumexp(dim=0).to(log_total_M.dtype),
        picked_RM.sum(dim=0).to(picked_M.dtype),
        best_RM.gather(0, best_rank_1M)[0].to(best_M.dtype),
    )


def _slices(logits_MV: Tensor) -> Iterator[slice]:
    num_rows, num_columns = logits_MV.shape
    num_bytes = _CPU_SLICE_BYTES if logits_MV.device.type == "cpu" else _GPU_SLICE_BYTES
    if num_columns == 0:  # a tensor-parallel rank without words
        return iter(())
    step = max(1, num_bytes // (4 * num_columns))
    return (slice(first, first + step) for first in range(0, num_rows, step))
