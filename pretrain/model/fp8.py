"""Linears of the encoder whose three products are computed in FP8 (`precision=fp8`).

Activations and weights are rounded to e4m3, gradients to e5m2, each with one scale for the whole tensor; sums are fp32,
results and biases have the dtype of the layer. Weights stay as they are: a rounded copy lives during
one product, so ZeRO-3 gathers and frees them as usual. Backward needs the rounded activations only, a byte each.

Shape letters: T tokens, I input features, O output features, Q = T rounded up to a multiple of 16.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import ScalingType, scaled_mm

from pretrain.errors import ConfigError
from pretrain.kernels.choice import Kernels
from pretrain.kernels.fp8_cast import FORWARD_DTYPE, GRADIENT_DTYPE, MULTIPLE, Fp8, cast_to_fp8
from pretrain.model.layer_spec import LayerSpec, Linear

_SMALLEST_CAPABILITY = (8, 9)


def with_fp8_linears(layers: LayerSpec) -> LayerSpec:
    """The same layers with FP8 linears in the encoder; `layers` must not be tensor-parallel."""

    def linear(in_features: int, out_features: int) -> nn.Module:
        return Fp8Linear(in_features, out_features, layers.kernels)

    return replace(layers, column_linear=linear, row_linear=linear)


def check_fp8(device: torch.device, *, is_emulated: bool) -> None:
    """Refuse a device without FP8 products.

    Raises:
        ConfigError: says what the device is, and what to set.
    """
    if device.type == "cpu":
        if not is_emulated:
            raise ConfigError(
                "precision=fp8: there is no GPU here, and a CPU has no FP8 products; set precision=bf16, or "
                "fp8.emulate=true to compute them in software, slowly"
            )
        return
    if is_emulated:
        raise ConfigError("fp8.emulate=true is for a CPU, and this run computes on a GPU; leave it out")
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or capability < _SMALLEST_CAPABILITY:
        number = ".".join(map(str, capability))
        raise ConfigError(
            f"precision=fp8: {torch.cuda.get_device_name(device)} (compute capability {number}) has no FP8 products, "
            "which NVIDIA's GPUs have from 8.9 on (H100: 9.0); set precision=bf16"
        )


class Fp8Linear(Linear):
    """A linear with a bias; both numbers of features must be multiples of 16.

    Raises:
        ConfigError: they are not.
    """

    def __init__(self, in_features: int, out_features: int, kernels: Kernels = "torch") -> None:
        for what, number in (("input", in_features), ("output", out_features)):
            if number % MULTIPLE:
                raise ConfigError(
                    f"precision=fp8: a linear of {number} {what} features: FP8 products need a multiple of {MULTIPLE}; "
                    f"choose model.hidden_size and model.ffn_hidden_size accordingly, or set precision=bf16"
                )
        super().__init__(in_features, out_features)
        self.kernels = kernels

    def forward(self, input: Tensor) -> Tensor:
        """[T, O] of [T, I]."""
        output: Tensor = _Fp8Product.apply(input, self.weight, self.bias, self.kernels)
        return output


class _Fp8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_TI: Tensor, weight_OI: Tensor, bias_O: Tensor, kernels: Kernels) -> Tensor:
        input8 = cast_to_fp8(input_TI, FORWARD_DTYPE, columns=True, kernels=kernels)
        weight8 = cast_to_fp8(weight_OI, FORWARD_DTYPE, kernels=kernels)
        output_TO = _multiply(input8.rows_NF, input8, weight8.rows_NF, weight8, input_TI.dtype, is_fast=True)
        ctx.save_for_backward(input8.columns_FQ, input8.scale, weight_OI)
        ctx.kernels, ctx.bias_dtype = kernels, bias_O.dtype
        return output_TO.add_(bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        input_IQ, input_scale, weight_OI = ctx.saved_tensors
        input8 = Fp8(None, input_IQ, input_scale)
        grad8 = cast_to_fp8(grad_TO, GRADIENT_DTYPE, columns=True, kernels=ctx.kernels)
        weight8 = cast_to_fp8(weight_OI, FORWARD_DTYPE, rows=False, columns=True, kernels=ctx.kernels)
        grad_input_TI = _multiply(grad8.rows_NF, grad8, weight8.columns_FQ, weight8, grad_TO.dtype)
        grad_weight_OI = _multiply(grad8.columns_FQ, grad8, input8.columns_FQ, input8, weight_OI.dtype)
        return grad_input_TI, grad_weight_OI, grad_TO.sum(dim=0, dtype=ctx.bias_dtype), None


def _multiply(
    left_XK: Tensor | None, left: Fp8, right_YK: Tensor | None, right: Fp8, dtype: torch.dtype, *, is_fast: bool = False
) -> Tensor:
    """The product [X, Y] of two FP8 matrices over K, which is the last dimension of both.

    `is_fast` lets a GPU keep fewer bits of partial sums, which forward can afford and gradients cannot.
    """
    assert left_XK is not None
    assert right_YK is not None
    return scaled_mm(
        left_XK,
        right_YK.t(),
        left.scale,
        ScalingType.TensorWise,
        right.scale,
        ScalingType.TensorWise,
        output_dtype=dtype,
        use_fast_accum=is_fast,
    )
