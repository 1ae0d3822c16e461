"""How the tensor-parallel ranks share a parameter: its full shape, its parts, and the conversion between them.

A part is a contiguous block of the split dimension. The word matrix and the vocabulary bias have unused rows at the
end; they stand for no word, are 0, and do not belong to the full parameter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.layer_spec import LayerSpec, num_words_of


@dataclass(frozen=True)
class ParameterShape:
    """Full shape of a parameter, and the dimension that tensor-parallel ranks split; None if each has all of it."""

    full: tuple[int, ...]
    split_dim: int | None = None
    num_rows: int | None = None
    """Rows of all parts together, unused ones included; None: as few as equal parts of the full parameter need."""

    def __post_init__(self) -> None:
        """Refuse an invalid shape, which may come from a file.

        Raises:
            ValueError: a size is not a positive integer, or the split dimension does not exist.
        """
        if not all(type(size) is int and size > 0 for size in self.full):
            raise ValueError(f"{self.full} is not a shape")
        if self.split_dim is not None and self.split_dim not in range(len(self.full)):
            raise ValueError(f"shape {self.full} has no dimension {self.split_dim}")
        if self.num_rows is not None and self.num_rows < self.full[0]:
            raise ValueError(f"{self.num_rows} rows do not hold {self.full}")

    @property
    def num_elements(self) -> int:
        """Elements of the full parameter."""
        return math.prod(self.full)

    def part_shape(self, num_parts: int) -> tuple[int, ...]:
        """Shape of one of `num_parts` parts, all of which are equal."""
        shape = list(self.full)
        if self.num_rows is not None:
            shape[0] = self.num_rows
        if self.split_dim is not None:
            shape[self.split_dim] = -(-shape[self.split_dim] // num_parts)
        return tuple(shape)

    def part_of(self, full: Tensor, part: int, num_parts: int) -> Tensor:
        """Part number `part` of the full tensor."""
        dim = self.split_dim
        if dim is None:
            dim, part, num_parts = 0, 0, 1
        if not self.full or (num_parts == 1 and self.num_rows is None):
            return full
        size = self.part_shape(num_parts)[dim]
        num_padding = size * num_parts - full.shape[dim]
        if num_padding:
            full = F.pad(full, [0, 0] * (full.dim() - 1 - dim) + [0, num_padding])
        return full.narrow(dim, part * size, size)

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
    num_words = num_words_of(parameter)
    if num_words is None:
        return ParameterShape(tuple(shape), split_dim)
    return ParameterShape((num_words, *shape[1:]), split_dim, num_rows=shape[0])


def _split_dim(parameter: Tensor, layers: LayerSpec) -> int | None:
    if layers.tp_size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return None
    return int(parameter.partition_dim)  # type: ignore[attr-defined]
