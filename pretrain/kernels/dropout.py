"""Dropout alone: out = x * scale where kept, else 0. Nothing is stored: backward draws the mask again.

Shape letters: N tokens, D features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.data.native import native
from pretrain.kernels.choice import Kernels
from pretrain.kernels.dropout_mask import HiddenDropout, drop_threshold, is_native, keep_scale


def dropout(hidden_ND: Tensor, drop: HiddenDropout | None, kernels: Kernels = "torch") -> Tensor:
    """`hidden_ND` with what drops set to 0 and the rest scaled up; as it is without `drop`."""
    if drop is None:
        return hidden_ND
    dropped_ND: Tensor = _Dropout.apply(hidden_ND, drop.words, drop.line_N, drop.probability, drop.first_line, kernels)
    return dropped_ND


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        words: Tensor,
        line_N: Tensor | None,
        probability: float,
        first_line: int,
        kernels: Kernels,
    ) -> Tensor:
        ctx.save_for_backward(words, line_N)
        ctx.probability, ctx.first_line, ctx.kernels = probability, first_line, kernels
        return _drop(hidden_ND, HiddenDropout(probability, words, first_line, line_N), kernels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        words, line_N = ctx.saved_tensors
        drop = HiddenDropout(ctx.probability, words, ctx.first_line, line_N)
        return _drop(grad_ND, drop, ctx.kernels), None, None, None, None, None


def _drop(hidden_ND: Tensor, drop: HiddenDropout, kernels: Kernels) -> Tensor:
    if kernels == "triton":
        from pretrain.kernels.dropout_triton import drop_triton

        return drop_triton(hidden_ND.contiguous(), drop)
    if not is_native(hidden_ND):
        return drop.apply(hidden_ND)
    hidden_ND = hidden_ND.contiguous()
    out_ND = torch.empty_like(hidden_ND)
    threshold = drop_threshold(drop.probability)
    native().drop(
        drop.words.numpy(),
        threshold,
        keep_scale(threshold),
        None if drop.line_N is None else drop.line_N.numpy(),
        drop.first_line,
        hidden_ND.detach().numpy(),
        out_ND.numpy(),
        torch.get_num_threads(),
    )
    return out_ND
