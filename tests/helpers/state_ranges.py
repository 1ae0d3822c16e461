"""State files from ranges with their values, without an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from pretrain.checkpoint.state_files import Range, write_state
from pretrain.durable import FileRecord
from pretrain.model.parameter_shape import ParameterShape


def write(
    checkpoint: Path, rank: int, ranges: Sequence[tuple[Range, Tensor]], shapes: Mapping[str, ParameterShape]
) -> FileRecord:
    """Write the file of `rank`."""
    return write_state(checkpoint, rank, [found for found, _ in ranges], dict(ranges).__getitem__, shapes)
