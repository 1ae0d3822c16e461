"""How the tensor-parallel ranks share a parameter: its full shape, its parts, and the conversion between them.

A part is a contiguous block of the split dimension. The word matrix and the vocabulary bias are padded to a multiple of
the number of parts; the padding stands for no word, is 0, and does not belong to the full parameter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.layer_spec import LayerSpec


@dataclass(frozen=True)
class ParameterShape:
    """Full shape of a parameter, and the dimension that tensor-parallel ranks split; None if each has all of it."""

    full: tuple[int, ...]
    split_dim: int | None = None

    def __post_init__(self) -> None:
        """Refuse an invalid shape, which may come from a file.

        Raises:
            ValueError: a size is not a positive integer, or the split dimension does not exist.
        """
        if not all(type(size) is int and size > 0 for size in self.full):
            raise ValueError(f"{self.full} is not a shape")
        if self.split_dim is not None and self.split_dim not in range(len(self.full)):
            raise ValueError(f"shape {self.full} has no dimension {self.split_dim}")

    @property
    def num_elements(self) -> int:
        """Elements of the full parameter."""
        return math.prod(self.full)

    def part_shape(self, num_parts: int) -> tuple[int, ...]:
        """Shape of one of `num_parts` parts, all of which are equal."""
        if self.split_dim is None:
            return self.full
        shape = list(self.full)
        shape[self.split_dim] = -(-shape[self.split_dim] // num_parts)
        return tuple(shape)

    def part_of(self, full: Tensor, part: int, num_parts: int) -> Tensor:
        """Part number `part` of the full tensor."""
        if self.split_dim is None or num_parts == 1:
            return full
        size = self.part_shape(num_parts)[self.split_dim]
        num_padding = size * num_parts - full.shape[self.split_dim]
        if num_padding:
            full = F.pad(full, [0, 0] * (full.dim() - 1 - self.split_dim) + [0, num_padding])
        return full.narrow(self.split_dim, part * size, size)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The full tensor from all of its parts, in order."""
        if self.split_dim is None or len(parts) == 1:
            return parts[0]
        return torch.cat(list(parts), dim=self.split_dim).narrow(self.split_dim, 0, self.full[self.split_dim])


def parameter_shape(parameter: Tensor, layers: LayerSpec) -> ParameterShape:
    """The shape, over all tensor-parallel ranks, of a parameter built by `layers` (before ZeRO-3 empties it)."""
    shape = list(parameter.shape)
    split_dim = _split_dim(parameter, layers)
    if split_dim is not None:
        shape[split_dim] *= layers.tp_size
    shape[0] = getattr(parameter, "num_words", shape[0])
    return ParameterShape(tuple(shape), split_dim)


def _split_dim(parameter: Tensor, layers: LayerSpec) -> int | None:
    if layers.tp_size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return None
    return int(parameter.partition_dim)  # type: ignore[attr-defined]
