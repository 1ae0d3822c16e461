"""An attention as one differentiable operation: for torch.compile an operator of its own, otherwise two plain calls.

torch.compile need not look into an operator. To call one without it costs more: torch's wrappers take tens of
microseconds of the host each time, and the first call loads TorchDynamo, a second at every start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.kernels.attention_dropout import AttentionDropout

_DROPOUT = "float probability, Tensor? words, int first_head, int num_heads, int row_length"
_NUM_DROPOUT = len(AttentionDropout._fields)

Forward = Callable[..., tuple[Tensor, Tensor]]
Backward = Callable[..., Tensor]


def differentiable(
    name: str, arguments: str, forward: Forward, backward: Backward, empty_outputs: Forward
) -> Callable[..., tuple[Tensor, Tensor]]:
    """One function of both passes.

    Args:
        name: of the operator, in the namespace `taco`.
        arguments: its schema before the fields of an `AttentionDropout`, four of them: projections, size of a head, and
            two tensors that have no gradient, the second of which may be None.
        forward: its outputs are the attention and what its backward pass needs besides.
        backward: takes the gradient of the first output, both outputs, and the arguments; gives the gradient of the
            projections.
        empty_outputs: outputs of the right shapes and dtypes.
    """
    schema = f"{arguments}, {_DROPOUT}"
    forward_operator = torch.library.custom_op(
        f"taco::{name}", forward, mutates_args=(), schema=f"({schema}) -> (Tensor, Tensor)"
    )
    backward_operator = torch.library.custom_op(
        f"taco::{name}_backward",
        backward,
        mutates_args=(),
        schema=f"(Tensor gradient, Tensor output, Tensor kept, {schema}) -> Tensor",
    )
    forward_operator.register_fake(empty_outputs)
    backward_operator.register_fake(
        lambda gradient, output, kept, projections, *_: projections.new_empty(projections.shape)
    )
    forward_operator.register_autograd(_gradients_by(backward_operator), setup_context=_keep)
    differentiate = _gradients_by(backward)

    class PlainCalls(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
            output = forward(*inputs)
            _keep(ctx, inputs, output)
            ctx.mark_non_differentiable(output[1])
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *gradients: Tensor | None) -> Any:
            return differentiate(ctx, *gradients)

    def call(*inputs: Any) -> tuple[Tensor, Tensor]:
        outputs: tuple[Tensor, Tensor]
        outputs = forward_operator(*inputs) if torch.compiler.is_compiling() else PlainCalls.apply(*inputs)
        return outputs

    return call


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    projections, ctx.head_size, bounds, places, ctx.probability, words, *ctx.numbers = inputs
    ctx.save_for_backward(*output, projections, bounds, places, words)
    ctx.set_materialize_grads(False)


def _gradients_by(backward: Backward) -> Callable[..., tuple[Tensor | None, ...]]:
    def differentiate(ctx: Any, gradient: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        output, kept, projections, bounds, places, words = ctx.saved_tensors
        settings = (ctx.probability, words, *ctx.numbers)
        grad_projections = None
        if gradient is not None:
            grad_projections = backward(gradient, output, kept, projections, ctx.head_size, bounds, places, *settings)
        return grad_projections, None, None, None, *(None for _ in range(_NUM_DROPOUT))

    return differentiate
