"""Initial weights as a function of (seed, parameter name, full shape): no layout changes them.

A tensor-parallel rank draws the full matrix and keeps its part, a pipeline stage draws its own layers only, and all end
with the weights that one process would have.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from pretrain.model.layer_spec import LayerSpec, padded_vocab_size


def initialise(model: nn.Module, layers: LayerSpec, *, initializer_range: float, seed: int) -> None:
    """Fill every parameter of `model` in place: BERT's normal(0, initializer_range), biases 0, LayerNorm weights 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            full = initial_value(name, full_shape(parameter, layers), initializer_range, seed)
            parameter.copy_(local_part(full, parameter, layers))


def initial_value(name: str, shape: tuple[int, ...], initializer_range: float, seed: int) -> Tensor:
    """The full initial fp32 value of the parameter called `name`, on the CPU."""
    if name.endswith("bias"):
        return torch.zeros(shape)
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    digest = hashlib.blake2b(f"initial {seed} {name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.empty(shape).normal_(0.0, initializer_range, generator=generator)


def full_shape(parameter: Tensor, layers: LayerSpec) -> tuple[int, ...]:
    """The shape over all tensor-parallel ranks."""
    shape = list(parameter.shape)
    if _is_split(parameter, layers):
        shape[parameter.partition_dim] *= layers.tp_size  # type: ignore[attr-defined]
    shape[0] = getattr(parameter, "num_words", shape[0])  # without the rows that stand for no word
    return tuple(shape)


def local_part(full: Tensor, parameter: Tensor, layers: LayerSpec) -> Tensor:
    """What this tensor-parallel rank holds of a full matrix: a contiguous block of the split dimension.

    Rows that stand for no word are 0, and stay so: their logits are -inf and have no gradient.
    """
    if not _is_split(parameter, layers):
        return full
    if hasattr(parameter, "num_words"):
        num_unused = padded_vocab_size(len(full), layers.tp_size) - len(full)
        full = torch.cat([full, full.new_zeros(num_unused, *full.shape[1:])])
    return full.chunk(layers.tp_size, dim=parameter.partition_dim)[layers.tp_rank]  # type: ignore[attr-defined]


def _is_split(parameter: Tensor, layers: LayerSpec) -> bool:
    return layers.tp_size > 1 and getattr(parameter, "tensor_model_parallel", False)
