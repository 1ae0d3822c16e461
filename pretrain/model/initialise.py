"""Initial weights as a function of (seed, parameter name, full shape): no layout changes them.

A tensor-parallel rank draws the full matrix and keeps its part, a pipeline stage draws only its own layers, and all get
the weights that a single process would have.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from pretrain.model.layer_spec import LayerSpec
from pretrain.model.parameter_shape import parameter_shape


def initialise(model: nn.Module, layers: LayerSpec, *, initializer_range: float, seed: int) -> None:
    """Fill every parameter of `model` in place: BERT's normal(0, initializer_range), biases 0, LayerNorm weights 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = parameter_shape(parameter, layers)
            full = initial_value(name, shape.full, initializer_range, seed)
            parameter.copy_(shape.part_of(full, layers.tp_rank, layers.tp_size))


def initial_value(name: str, shape: tuple[int, ...], initializer_range: float, seed: int) -> Tensor:
    """The full initial fp32 value of the parameter called `name`, on the CPU."""
    if name.endswith("bias"):
        return torch.zeros(shape)
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    digest = hashlib.blake2b(f"initial {seed} {name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.empty(shape).normal_(0.0, initializer_range, generator=generator)
