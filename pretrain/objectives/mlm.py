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
    logits_MV: Tensor, label_M: Tensor, shard: VocabularyShard | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy in fp32 over the labels that are not -100, and how often the top prediction is correct.

    With `shard` the logits cover this rank's words only, and one small collective extends the loss to all words; labels
    remain ids of the whole vocabulary.

    Returns:
        loss: scalar, 0 with zero gradient if there is no label.
        num_correct, num_labels: int64 scalars, without gradient.

    Raises:
        ValueError: shapes that do not fit.
    """
    if logits_MV.dim() != 2 or label_M.shape != logits_MV.shape[:1]:
        raise ValueError(f"expected logits [M, V] and labels [M], found {list(logits_MV.shape)}, {list(label_M.shape)}")
    loss, num_correct, num_labels = _MaskedCrossEntropy.apply(logits_MV, label_M, shard)
    return loss, num_correct, num_labels


class _MaskedCrossEntropy(torch.autograd.Function):
    """Cross-entropy that keeps nothing of size [M, V] besides the logits, and creates only their gradient.

    torch's own saves a second [M, V] of log-probabilities, in fp32 under bf16, and needs a further pass for accuracy.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_MV: Tensor, label_M: Tensor, shard: VocabularyShard | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(logits_MV.dtype, torch.float32)
        is_label_M = label_M != IGNORED_LABEL
        column_M = label_M if shard is None else label_M - shard.first
        is_here_M = (column_M >= 0) & (column_M < logits_MV.shape[1]) & is_label_M
        target_M = column_M.where(is_here_M, 0)
        log_total_M, best_logit_M = (torch.empty(len(label_M), dtype=dtype, device=logits_MV.device) for _ in "12")
        best_M = torch.empty_like(label_M)
        for rows in _slices(logits_MV):
            slice_MV = logits_MV[rows].to(dtype)
            log_total_M[rows] = slice_MV.logsumexp(dim=-1)
            best_logit_M[rows], best_M[rows] = slice_MV.max(dim=-1)
        num_labels = is_label_M.sum()
        weight_M = is_label_M / num_labels.clamp(min=1).to(dtype)
        picked_M = logits_MV.gather(1, target_M[:, None])[:, 0].to(dtype).where(is_here_M, 0)
        if shard is not None:
            log_total_M, picked_M, best_M = _over_all_words(log_total_M, picked_M, best_logit_M, best_M, shard)
        loss = ((log_total_M - picked_M) * weight_M).sum()
        num_correct = ((best_M == label_M) & is_label_M).sum()
        ctx.save_for_backward(logits_MV, target_M, is_here_M, log_total_M, weight_M)
        ctx.mark_non_differentiable(num_correct, num_labels)
        return loss, num_correct, num_labels

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        logits_MV, target_M, is_here_M, log_total_M, weight_M = ctx.saved_tensors
        scale_M1 = (weight_M * grad_loss)[:, None]
        step_M1 = -scale_M1 * is_here_M[:, None]
        gradient_MV = torch.empty_like(logits_MV)
        for rows in _slices(logits_MV):
            slice_MV = (logits_MV[rows].to(log_total_M.dtype) - log_total_M[rows, None]).exp_().mul_(scale_M1[rows])
            slice_MV.scatter_add_(1, target_M[rows, None], step_M1[rows])
            gradient_MV[rows] = slice_MV
        return gradient_MV, None, None


def _over_all_words(
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
    step = max(1, num_bytes // (4 * num_columns))
    return (slice(first, first + step) for first in range(0, num_rows, step))
