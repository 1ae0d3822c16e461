"""Cross-entropy over the vocabulary in Triton; `objectives/mlm.py` has the plain twin that defines it.

One pass over the logits [M, V] finds, per row, the log-sum-exp (online softmax, Milakov and Gimelshein 2018), the
largest logit and that of the label; backward makes a second one, which writes the gradient over the logits and sums it
into that of the bias. The bias is added in both, so no pass is made for it. Sums are fp32.

Shape letters: M masked positions, V columns of the logits, P blocks of rows in backward.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.objectives.mlm import IGNORED_LABEL, VocabularyShard, check_shapes, over_all_words, spend

# Columns of a program's step forward, and of a program backward: 16 bytes of 16-bit logits per thread and load.
_FORWARD_COLUMNS = 4096
_BACKWARD_COLUMNS = 1024
# Rows of a program backward, which sums them into one row of the bias' gradient, and of them at a time.
_BACKWARD_ROWS = 32
_ROWS_AT_ONCE = 4
_FINISH_ROWS = 1024


def masked_lm_loss(
    logits_MV: Tensor,
    label_M: Tensor,
    shard: VocabularyShard | None = None,
    *,
    bias_V: Tensor | None = None,
    num_words: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `objectives.mlm.masked_lm_loss`, except that the logits are not changed before backward.

    Raises:
        ValueError: shapes that do not fit, or logits in fp64.
        RuntimeError: a second backward.
    """
    num_words = check_shapes(logits_MV, label_M, bias_V, num_words)
    if logits_MV.dtype == torch.float64:
        raise ValueError("the Triton kernel sums in fp32; for fp64 logits use train.kernels=torch")
    loss, num_correct, num_labels = _FusedCrossEntropy.apply(logits_MV, bias_V, label_M, shard, num_words)
    return loss, num_correct, num_labels


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_MV: Tensor,
        bias_V: Tensor | None,
        label_M: Tensor,
        shard: VocabularyShard | None,
        num_words: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_rows, num_columns = logits_MV.shape
        ctx.keeps_logits = logits_MV.is_leaf and bias_V is None
        if logits_MV.stride(1) != 1:
            logits_MV = logits_MV.contiguous()
        label_M = label_M.contiguous()
        first = 0 if shard is None else shard.first
        log_total_M, picked_M, best_logit_M = (logits_MV.new_empty(num_rows, dtype=torch.float32) for _ in "123")
        best_M = torch.empty_like(label_M)
        if num_rows > 0:
            _find_totals[(num_rows,)](
                logits_MV,
                logits_MV.stride(0),
                bias_V,
                label_M,
                first,
                num_words,
                num_columns,
                log_total_M,
                picked_M,
                best_logit_M,
                best_M,
                HAS_BIAS=bias_V is not None,
                COLUMNS=_FORWARD_COLUMNS,
                num_warps=8,
            )
        if shard is not None:
            log_total_M, picked_M, best_M = over_all_words(log_total_M, picked_M, best_logit_M, best_M, shard)
        loss = logits_MV.new_empty((), dtype=torch.float32)
        num_correct, num_labels = label_M.new_empty(()), label_M.new_empty(())
        _finish[(1,)](
            log_total_M,
            picked_M,
            best_M,
            label_M,
            num_rows,
            loss,
            num_correct,
            num_labels,
            IGNORED=IGNORED_LABEL,
            ROWS=_FINISH_ROWS,
        )
        ctx.save_for_backward(logits_MV, bias_V, label_M, log_total_M, num_labels)
        ctx.first, ctx.num_words, ctx.is_spent = first, num_words, False
        ctx.mark_non_differentiable(num_correct, num_labels)
        return loss, num_correct, num_labels

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor, Tensor | None, None, None, None]:
        spend(ctx)
        logits_MV, bias_V, label_M, log_total_M, num_labels = ctx.saved_tensors
        num_rows, num_columns = logits_MV.shape
        gradient_MV = torch.empty_like(logits_MV) if ctx.keeps_logits else logits_MV
        num_blocks = triton.cdiv(num_rows, _BACKWARD_ROWS)
        # Sums per block of rows, added afterwards: atomic additions would depend on the order of the programs.
        sums_PV = None if bias_V is None else log_total_M.new_empty(num_blocks, num_columns)
        if num_rows > 0:
            _write_gradient[(triton.cdiv(num_columns, _BACKWARD_COLUMNS), num_blocks)](
                logits_MV,
                logits_MV.stride(0),
                gradient_MV,
                gradient_MV.stride(0),
                bias_V,
                sums_PV,
                label_M,
                log_total_M,
                grad_loss,
                num_labels,
                ctx.first,
                num_rows,
                ctx.num_words,
                num_columns,
                IGNORED=IGNORED_LABEL,
                HAS_BIAS=bias_V is not None,
                ROWS=_BACKWARD_ROWS,
                ROWS_AT_ONCE=_ROWS_AT_ONCE,
                COLUMNS=_BACKWARD_COLUMNS,
                num_warps=4,
            )
        bias_gradient_V = None if sums_PV is None or bias_V is None else sums_PV.sum(dim=0).to(bias_V.dtype)
        return gradient_MV, bias_gradient_V, None, None, None


@triton.jit
def _find_totals(  # type: ignore[no-untyped-def]
    logits,
    row_stride,
    bias,
    labels,
    first_word,
    num_words,
    num_columns,
    log_totals,
    picked,
    best_logits,
    bests,
    HAS_BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One row per program: its log-sum-exp, its label's logit (0 if it is not here), its largest logit and where."""
    row = tl.program_id(0)
    row_logits = logits + row.to(tl.int64) * row_stride
    label = tl.load(labels + row) - first_word
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    label_logit = tl.full((), 0.0, tl.float32)
    best = tl.full((), 0, tl.int32)
    for start in range(0, num_words, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        # The mask of the load is that of all columns, a multiple of 64, so that it stays 16 bytes wide.
        logit = tl.load(row_logits + column, mask=column < num_columns, other=0.0).to(tl.float32)
        if HAS_BIAS:
            logit += tl.load(bias + column, mask=column < num_columns, other=0.0).to(tl.float32)
        logit = tl.where(column < num_words, logit, float("-inf"))
        block_largest, place = tl.max(logit, axis=0, return_indices=True, return_indices_tie_break_left=True)
        best = tl.where(block_largest > largest, start + place, best)
        new_largest = tl.maximum(largest, block_largest)
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(logit - new_largest), axis=0)
        largest = new_largest
        label_logit += tl.sum(tl.where(column == label, logit, 0.0), axis=0)
    is_here = (label >= 0) & (label < num_words)
    tl.store(log_totals + row, largest + tl.log(total))
    tl.store(picked + row, tl.where(is_here, label_logit, 0.0))
    tl.store(best_logits + row, largest)
    tl.store(bests + row, best.to(tl.int64))


# The number of rows differs from micro-batch to micro-batch: no kernel of its own for one that 16 divides.
@triton.jit(do_not_specialize=["num_rows"])
def _finish(  # type: ignore[no-untyped-def]
    log_totals,
    picked,
    bests,
    labels,
    num_rows,
    loss,
    num_correct,
    num_labels,
    IGNORED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: the mean over the rows that have a label, how many have one, and how many predict it."""
    loss_sum = tl.zeros([ROWS], tl.float32)
    correct = tl.zeros([ROWS], tl.int64)
    count = tl.zeros([ROWS], tl.int64)
    for start in range(0, num_rows, ROWS):
        row = start + tl.arange(0, ROWS)
        label = tl.load(labels + row, mask=row < num_rows, other=IGNORED)
        is_label = label != IGNORED
        difference = tl.load(log_totals + row, mask=row < num_rows, other=0.0)
        difference -= tl.load(picked + row, mask=row < num_rows, other=0.0)
        # A product, not a choice: a row without a label that is not finite must show in the loss, as in the twin.
        loss_sum += difference * is_label.to(tl.float32)
        correct += ((tl.load(bests + row, mask=row < num_rows, other=-1) == label) & is_label).to(tl.int64)
        count += is_label.to(tl.int64)
    total = tl.sum(count, axis=0)
    tl.store(loss, tl.sum(loss_sum, axis=0) / tl.maximum(total, 1).to(tl.float32))
    tl.store(num_correct, tl.sum(correct, axis=0))
    tl.store(num_labels, total)


@triton.jit(do_not_specialize=["num_rows"])
def _write_gradient(  # type: ignore[no-untyped-def]
    logits,
    row_stride,
    gradient,
    gradient_stride,
    bias,
    bias_sums,
    labels,
    log_totals,
    grad_loss,
    num_labels,
    first_word,
    num_rows,
    num_words,
    num_columns,
    IGNORED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_AT_ONCE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A block of rows and columns per program; `gradient` may be `logits`, since a program reads what it writes."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < num_columns
    first_row = tl.program_id(1) * ROWS
    share = tl.load(grad_loss).to(tl.float32) / tl.maximum(tl.load(num_labels), 1).to(tl.float32)
    sums = tl.zeros([COLUMNS], tl.float32)
    if HAS_BIAS:
        added = tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)
    for start in range(0, ROWS, ROWS_AT_ONCE):
        row = first_row + start + tl.arange(0, ROWS_AT_ONCE)
        is_row = row < num_rows
        label = tl.load(labels + row, mask=is_row, other=IGNORED)
        log_total = tl.load(log_totals + row, mask=is_row, other=0.0)
        scale = tl.where(label != IGNORED, share, 0.0)
        mask = is_row[:, None] & is_column[None, :]
        place = row.to(tl.int64)[:, None] * row_stride + column[None, :]
        logit = tl.load(logits + place, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            logit += added[None, :]
        slope = tl.exp(logit - log_total[:, None]) - ((label - first_word)[:, None] == column[None, :]).to(tl.float32)
        # A product before the choice: a row that is not finite gives a gradient that is not, whatever its label.
        slope = tl.where(mask & (column < num_words)[None, :], slope * scale[:, None], 0.0)
        target = row.to(tl.int64)[:, None] * gradient_stride + column[None, :]
        tl.store(gradient + target, slope.to(gradient.dtype.element_ty), mask=mask)
        sums += tl.sum(slope, axis=0)
    if HAS_BIAS:
        tl.store(bias_sums + tl.program_id(1).to(tl.int64) * num_columns + column, sums, mask=is_column)
