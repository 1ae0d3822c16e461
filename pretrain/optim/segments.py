"""Which elements of a flat buffer belong to which parameter.

ZeRO hands an optimizer flat buffers, each a slice of many parameters laid one after the other, with padding between or
behind them. An optimizer that looks at whole parameters, as LAMB does, learns here where they are.

Shape letters: N elements of a buffer, S segments.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from pretrain.kernels.lamb import BlockTable


class Segment(NamedTuple):
    """Elements `start` to `start + length` of a buffer: a part of parameter number `parameter`."""

    parameter: int
    start: int
    length: int


class SegmentTable:
    """The segments of one buffer of `num_elements`, in order; elements of no segment are padding.

    Raises:
        ValueError: segments overlap, are empty or leave the buffer, or a parameter has two of them.
    """

    def __init__(self, segments: Iterable[Segment], num_elements: int) -> None:
        self.segments = tuple(sorted(segments, key=lambda segment: segment.start))
        self.num_elements = num_elements
        if len({segment.parameter for segment in self.segments}) < len(self.segments):
            raise ValueError("a parameter has two segments in one buffer")
        self._blocks: BlockTable | None = None
        self._sizes: list[int] = []
        self._places: list[int] = []
        end = 0
        for segment in self.segments:
            if segment.start < end or segment.length < 1:
                raise ValueError(f"{segment} overlaps the segment before, which ends at {end}, or is empty")
            if segment.start > end:
                self._sizes.append(segment.start - end)
            self._places.append(len(self._sizes))
            self._sizes.append(segment.length)
            end = segment.start + segment.length
        if end > num_elements:
            raise ValueError(f"{self.segments[-1]} leaves its buffer of {num_elements} elements")
        if end < num_elements:
            self._sizes.append(num_elements - end)

    @cached_property
    def parameters(self) -> Tensor:
        """[S] int64: the parameter of each segment."""
        return torch.tensor([segment.parameter for segment in self.segments], dtype=torch.int64)

    @cached_property
    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Start and length of each segment, int64 [S]."""
        starts, lengths = [piece.start for piece in self.segments], [piece.length for piece in self.segments]
        return np.array(starts, np.int64), np.array(lengths, np.int64)

    def split(self, buffer_N: Tensor) -> list[Tensor]:
        """The S segments of a buffer as views."""
        if len(self._sizes) == 1:
            return [buffer_N][: len(self.segments)]
        parts = buffer_N.view(-1).split_with_sizes(self._sizes)
        return [parts[place] for place in self._places]

    def blocks(self, device: torch.device) -> BlockTable:
        """The segments cut into blocks for Triton's kernels, on a device."""
        if self._blocks is None or self._blocks.start_G.device != device:
            from pretrain.kernels.lamb import block_table

            starts, lengths = [piece.start for piece in self.segments], [piece.length for piece in self.segments]
            self._blocks = block_table(starts, lengths, [piece.parameter for piece in self.segments], device)
        return self._blocks
