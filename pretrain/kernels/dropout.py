"""Dropout alone: out = x * scale where kept, else 0. Nothing is stored: backward draws the mask again.

Shape letters: N tokens, D features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.data.native import native
from pretrain.kernels.dropout_mask import (
    drop_threshold,
    is_native,
    keep_mask,
    keep_scale,
    line_numbers,
)


def dropout(
    hidden_ND: Tensor, probability: float, words: Tensor, *, first_line: int = 0, line_N: Tensor | None = None
) -> Tensor:
    """`hidden_ND` with each element set to 0 with `probability` and the others scaled up.

    Args:
        words: of the place in the model, see `dropout_mask.keep_mask`.
        first_line: the number of token 0 in the micro-batch, which the others follow.
        line_N: the numbers of the tokens, int64, where they do not.
    """
    dropped_ND: Tensor = _Dropout.apply(hidden_ND, probability, words, first_line, line_N)
    return dropped_ND


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, probability: float, words: Tensor, first_line: int, line_N: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(words, line_N)
        ctx.probability, ctx.first_line = probability, first_line
        return _drop(hidden_ND, probability, words, first_line, line_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        words, line_N = ctx.saved_tensors
        return _drop(grad_ND, ctx.probability, words, ctx.first_line, line_N), None, None, None, None


def _drop(hidden_ND: Tensor, probability: float, words: Tensor, first_line: int, line_N: Tensor | None) -> Tensor:
    threshold = drop_threshold(probability)
    scale = keep_scale(threshold)
    num_lines, width = hidden_ND.shape
    if hidden_ND.dtype == torch.float32 and is_native(hidden_ND):
        hidden_ND = hidden_ND.contiguous()
        out_ND = torch.empty_like(hidden_ND)
        native().drop(
            words.numpy(),
            threshold,
            scale,
            None if line_N is None else line_N.numpy(),
            first_line,
            hidden_ND.detach().numpy(),
            out_ND.numpy(),
            torch.get_num_threads(),
        )
        return out_ND
    lines = line_numbers(words, num_lines, first_line, line_N)
    return (hidden_ND * keep_mask(words, lines, width, probability)).mul_(scale)
