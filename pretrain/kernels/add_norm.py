"""Dropout + residual + LayerNorm as one operation that stores its output and one number per token, and nothing else.

    out = LayerNorm(residual + dropout(hidden)) * weight + bias

Backward gets the normalised values back from the output, (out - bias) / weight, and draws the dropout mask again: the
next matrix product keeps the output anyway, so LayerNorm, residual sum and dropout add 4 bytes per token. The price:
where a weight is much smaller than its bias the values come back inexactly (the type's relative error of the output,
divided by the weight), and where a weight is exactly 0 they count as 0. LayerNorm weights start at 1.

Sums, statistics and gradients are computed in fp32 or wider, whatever the type of the tensors. So an eps of 1e-12, too
small for 16-bit types, still keeps the inverse of a variance of 0 finite.

Shape letters: N tokens, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.data.native import native
from pretrain.kernels.choice import Kernels
from pretrain.kernels.dropout_mask import HiddenDropout, drop_threshold, is_native, keep_scale


def add_norm(
    hidden_ND: Tensor,
    residual_ND: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    *,
    eps: float,
    drop: HiddenDropout | None = None,
    kernels: Kernels = "torch",
) -> Tensor:
    """LayerNorm of `residual_ND` + dropped `hidden_ND`, [N, D], in their type; without `drop` nothing drops."""
    place = (None, None, 0.0, 0) if drop is None else (drop.words, drop.line_N, drop.probability, drop.first_line)
    out_ND: Tensor = _AddNorm.apply(hidden_ND, residual_ND, weight_D, bias_D, *place, eps, kernels)
    return out_ND


class Gradients(NamedTuple):
    """Of the arguments of `add_norm`."""

    hidden_ND: Tensor
    residual_ND: Tensor
    weight_D: Tensor
    bias_D: Tensor


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        residual_ND: Tensor,
        weight_D: Tensor,
        bias_D: Tensor,
        words: Tensor | None,
        line_N: Tensor | None,
        probability: float,
        first_line: int,
        eps: float,
        kernels: Kernels,
    ) -> Tensor:
        drop = None if words is None else HiddenDropout(probability, words, first_line, line_N)
        compute: Callable[..., tuple[Tensor, ...]] = forward_twin
        if kernels == "triton":
            from pretrain.kernels.add_norm_triton import forward_triton as compute
        elif is_native(hidden_ND, residual_ND, weight_D, bias_D):
            compute = _forward_native
        out_ND, rstd_N = compute(hidden_ND.contiguous(), residual_ND.contiguous(), weight_D, bias_D, eps, drop)
        ctx.save_for_backward(out_ND, rstd_N, weight_D, bias_D, words, line_N)
        ctx.probability, ctx.first_line, ctx.kernels = probability, first_line, kernels
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        out_ND, rstd_N, weight_D, bias_D, words, line_N = ctx.saved_tensors
        drop = None if words is None else HiddenDropout(ctx.probability, words, ctx.first_line, line_N)
        compute: Callable[..., tuple[Tensor, ...]] = backward_twin
        if ctx.kernels == "triton":
            from pretrain.kernels.add_norm_triton import backward_triton as compute
        elif is_native(grad_ND, out_ND, weight_D, bias_D):
            compute = _backward_native
        gradients = compute(grad_ND.contiguous(), out_ND, rstd_N, weight_D, bias_D, drop)
        return (*gradients, *[None] * 6)


# -- the plain twin: the definition ------------------------------------------------------------------------------------


def forward_twin(
    hidden_ND: Tensor, residual_ND: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float, drop: HiddenDropout | None
) -> tuple[Tensor, Tensor]:
    """The output, and 1 / standard deviation of every token [N] in fp32 or wider."""
    hidden, residual, weight, bias = map(_wide, (hidden_ND, residual_ND, weight_D, bias_D))
    total_ND = residual + (hidden if drop is None else drop.apply(hidden))
    variance_N1, mean_N1 = torch.var_mean(total_ND, dim=-1, correction=0, keepdim=True)
    rstd_N1 = (variance_N1 + eps).rsqrt()
    out_ND = (total_ND - mean_N1) * rstd_N1 * weight + bias
    return out_ND.to(hidden_ND.dtype), rstd_N1.squeeze(-1)


def backward_twin(
    grad_ND: Tensor, out_ND: Tensor, rstd_N: Tensor, weight_D: Tensor, bias_D: Tensor, drop: HiddenDropout | None
) -> Gradients:
    """The gradients, in the types of what they belong to."""
    grad, out, weight, bias = map(_wide, (grad_ND, out_ND, weight_D, bias_D))
    normal_ND = (out - bias) * torch.where(weight == 0, 0.0, 1.0 / weight)
    slope_ND = grad * weight
    along_N1 = (slope_ND * normal_ND).mean(dim=-1, keepdim=True)
    total_ND = (slope_ND - slope_ND.mean(dim=-1, keepdim=True) - normal_ND * along_N1) * rstd_N[:, None]
    return Gradients(
        (total_ND if drop is None else drop.apply(total_ND)).to(grad_ND.dtype),
        total_ND.to(grad_ND.dtype),
        (grad * normal_ND).sum(dim=0).to(weight_D.dtype),
        grad.sum(dim=0).to(bias_D.dtype),
    )


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# -- in C++, fp32 on a CPU: csrc/include/taco/step.hpp -----------------------------------------------------------------


def _forward_native(
    hidden_ND: Tensor, residual_ND: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float, drop: HiddenDropout | None
) -> tuple[Tensor, Tensor]:
    out_ND, rstd_N = torch.empty_like(hidden_ND), hidden_ND.new_empty(len(hidden_ND))
    arrays = _arrays(hidden_ND, residual_ND, weight_D, bias_D)
    native().add_norm(*_native_place(drop), *arrays, eps, *_arrays(out_ND, rstd_N), torch.get_num_threads())
    return out_ND, rstd_N


def _backward_native(
    grad_ND: Tensor, out_ND: Tensor, rstd_N: Tensor, weight_D: Tensor, bias_D: Tensor, drop: HiddenDropout | None
) -> Gradients:
    gradients = Gradients(*(torch.empty_like(tensor) for tensor in (grad_ND, grad_ND, weight_D, bias_D)))
    arrays = _arrays(grad_ND, out_ND, rstd_N, weight_D, bias_D, *gradients)
    native().add_norm_backward(*_native_place(drop), *arrays, torch.get_num_threads())
    return gradients


def _native_place(drop: HiddenDropout | None) -> tuple[Any, ...]:
    """Words, threshold, scale, numbers of the lines, number of the first one."""
    if drop is None:
        return torch.zeros(5, dtype=torch.int64).numpy(), 0, 1.0, None, 0
    threshold = drop_threshold(drop.probability)
    line_N = None if drop.line_N is None else drop.line_N.numpy()
    return drop.words.numpy(), threshold, keep_scale(threshold), line_N, drop.first_line


def _arrays(*tensors: Tensor) -> list[Any]:
    return [tensor.detach().numpy() for tensor in tensors]
