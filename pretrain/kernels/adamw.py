"""AdamW over a flat buffer in one pass: gradients of any precision in, fp32 state updated, 16-bit weights out.

The definition is `flat_adamw` in `pretrain/optim/adamw.py`. Every element is read and written once: 28 bytes with fp32
gradients and no copy, 28 with 16-bit gradients and a 16-bit copy.

Shape letters: N elements of the buffer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


@triton.jit
def bias_correction(step, log_beta):  # type: ignore[no-untyped-def]
    """1 - beta ** step, as fp32; in fp32 throughout, its first values for beta = 0.999 would be wrong by 1e-4."""
    return (1.0 - tl.exp(step.to(tl.float64) * log_beta)).to(tl.float32)


@triton.jit
def moved_moments(gradient, exp_avg, exp_avg_sq, rate1, beta2, rate2):  # type: ignore[no-untyped-def]
    """Both moments after a gradient; the rates are 1 - beta, which fp32 cannot compute from beta."""
    return exp_avg + (gradient - exp_avg) * rate1, exp_avg_sq * beta2 + gradient * gradient * rate2


@triton.jit
def rounded(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 in another precision, to the nearest, ties to even: Triton's interpreter would cut bf16's digits off."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def _adamw(  # type: ignore[no-untyped-def]
    weight, gradient, exp_avg, exp_avg_sq, copy, step, gradient_scale, skip, num_elements,
    lr, kept, rate1, beta2, rate2, log_beta1, log_beta2, eps,
    HAS_COPY: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SKIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_taken = place < num_elements
    if HAS_SKIP:
        is_taken = is_taken & (tl.load(skip) == 0)
    number = tl.load(step)
    correction1, correction2 = bias_correction(number, log_beta1), bias_correction(number, log_beta2)
    g = tl.load(gradient + place, mask=is_taken, other=0.0).to(tl.float32)
    if HAS_SCALE:
        g = g * tl.load(gradient_scale)
    w = tl.load(weight + place, mask=is_taken, other=0.0)
    m = tl.load(exp_avg + place, mask=is_taken, other=0.0)
    v = tl.load(exp_avg_sq + place, mask=is_taken, other=0.0)
    m, v = moved_moments(g, m, v, rate1, beta2, rate2)
    deviation = tl.sqrt_rn(v) / tl.sqrt_rn(correction2) + eps
    w = w * kept - (lr / correction1) * (m / deviation)
    tl.store(exp_avg + place, m, mask=is_taken)
    tl.store(exp_avg_sq + place, v, mask=is_taken)
    tl.store(weight + place, w, mask=is_taken)
    if HAS_COPY:
        tl.store(copy + place, rounded(w, copy.dtype.element_ty), mask=is_taken)


def rates(betas: tuple[float, float]) -> dict[str, float]:
    """What kernels need of the betas, computed in fp64: a kernel gets its numbers as fp32."""
    beta1, beta2 = betas
    logarithms = [math.log(beta) if beta > 0 else -math.inf for beta in betas]
    return {
        "rate1": 1 - beta1,
        "beta2": beta2,
        "rate2": 1 - beta2,
        "log_beta1": logarithms[0],
        "log_beta2": logarithms[1],
    }


def optional_inputs(
    weight_N: Tensor, copy_N: Tensor | None, scale: Tensor | None, skip: Tensor | None
) -> dict[str, Any]:
    """Arguments for what may be absent: a pointer that is not followed, and a constant that says so."""
    return {
        "copy": weight_N if copy_N is None else copy_N,
        "gradient_scale": weight_N if scale is None else scale,
        "skip": weight_N if skip is None else skip.view(torch.uint8),
        "HAS_COPY": copy_N is not None,
        "HAS_SCALE": scale is not None,
        "HAS_SKIP": skip is not None,
    }


def fused_adamw(
    weight_N: Tensor,
    gradient_N: Tensor,
    exp_avg_N: Tensor,
    exp_avg_sq_N: Tensor,
    step: Tensor,
    copy_N: Tensor | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    gradient_scale: Tensor | None,
    skip: Tensor | None,
) -> None:
    """`flat_adamw`, in one pass over contiguous buffers."""
    count(step, skip)
    num_elements = weight_N.numel()
    if num_elements == 0:
        return
    _adamw[(triton.cdiv(num_elements, _BLOCK),)](
        weight_N,
        gradient_N,
        exp_avg_N,
        exp_avg_sq_N,
        step=step,
        num_elements=num_elements,
        lr=lr,
        kept=1 - lr * weight_decay,
        eps=eps,
        **rates(betas),
        **optional_inputs(weight_N, copy_N, gradient_scale, skip),
        BLOCK=_BLOCK,
        num_warps=8,
    )


def count(step: Tensor, skip: Tensor | None) -> None:
    """One more update, unless it is skipped."""
    step.add_(1 if skip is None else skip.logical_not())
