"""Files that hold the state of a run without knowing its layout: what any ranks wrote, any others can read.

    state/
      rank-00000.safetensors     flat ranges of parameters and optimizer moments, written by rank 0
      rank-00001.safetensors     ...
      counters.json              optimizer steps, loss scale

A range is a one-dimensional fp32 tensor named KIND|NAME|PART/PARTS|START: elements START, START + 1, ... of the
flattened part number PART that one of PARTS tensor-parallel ranks holds of the parameter NAME. KIND is `weight`,
`exp_avg` or `exp_avg_sq`. Every element of every parameter lies in exactly one range, whatever ZeRO stage, pipeline or
number of ranks wrote it; each file says the full shapes of its parameters in its header.

DeepSpeed's own files know only the layout that wrote them, and its converters refuse some moves (ZeRO-3 to ZeRO-1) and
run pickles. These are plain safetensors: no code in them, no converter between them.

Shape letters: N elements of a range.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.durable import FileRecord, hashing_writer
from pretrain.errors import CheckpointError
from pretrain.model.parameter_shape import ParameterShape

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
STATE_FOLDER = "state"
COUNTERS_FILE = "counters.json"

_BYTES = 4
_CHUNK_ELEMENTS = 1 << 24


class Range(NamedTuple):
    """Which elements of which tensor: `start` counts in the flattened part `part` of `num_parts`."""

    kind: str
    name: str
    part: int
    num_parts: int
    start: int
    length: int

    @property
    def key(self) -> str:
        """Its name in a file."""
        return f"{self.kind}|{self.name}|{self.part}/{self.num_parts}|{self.start}"

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.length

    @classmethod
    def parse(cls, key: str, length: int) -> Range:
        """The range that `key` names.

        Raises:
            ValueError: it is no key of this format.
        """
        kind, name, parts, start = key.split("|")
        part, num_parts = parts.split("/")
        found = cls(kind, name, int(part), int(num_parts), int(start), length)
        if not (0 <= found.part < found.num_parts and found.start >= 0 and kind in (WEIGHT, *MOMENTS)):
            raise ValueError(f"{key!r} is out of range")
        return found


# -- writing -----------------------------------------------------------------------------------------------------------


def state_file(rank: int) -> str:
    """Name of the file that `rank` writes."""
    return f"rank-{rank:05d}.safetensors"


def write_state(
    checkpoint: Path,
    rank: int,
    ranges: Sequence[Range],
    values: Callable[[Range], Tensor],
    shapes: Mapping[str, ParameterShape],
) -> FileRecord:
    """Write one rank's ranges durably into a checkpoint folder.

    Args:
        values: gives the elements [N] of a range, of any float type and device; they become fp32 in small pieces, so
            that no second copy of the state is ever in memory.
        shapes: of every parameter that occurs, by name.

    Raises:
        OSError: the disk refuses.
    """
    path = checkpoint / STATE_FOLDER / state_file(rank)
    path.parent.mkdir(exist_ok=True)
    header = json.dumps(_header(ranges, shapes), separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with hashing_writer(path) as file:
        file.write(struct.pack("<Q", len(header)))
        file.write(header)
        for found in ranges:
            for chunk in values(found).detach().split(_CHUNK_ELEMENTS):
                file.write(memoryview(chunk.to("cpu", torch.float32).contiguous().numpy()).cast("B"))
    return FileRecord(path.relative_to(checkpoint).as_posix(), file.num_bytes, file.hexdigest())


def write_counters(checkpoint: Path, counters: Mapping[str, Any]) -> FileRecord:
    """Write the few numbers that belong to the state but to no parameter.

    Raises:
        OSError: the disk refuses.
    """
    path = checkpoint / STATE_FOLDER / COUNTERS_FILE
    path.parent.mkdir(exist_ok=True)
    with hashing_writer(path) as file:
        file.write((json.dumps(counters, indent=1, sort_keys=True) + "\n").encode())
    return FileRecord(path.relative_to(checkpoint).as_posix(), file.num_bytes, file.hexdigest())


def read_counters(checkpoint: Path) -> dict[str, Any]:
    """What `write_counters` wrote.

    Raises:
        CheckpointError: the file is missing or no such table.
    """
    path = checkpoint / STATE_FOLDER / COUNTERS_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"expected a table, found {type(found).__name__}")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    return found


def _header(ranges: Sequence[Range], shapes: Mapping[str, ParameterShape]) -> dict[str, Any]:
    names = sorted({found.name for found in ranges})
    described = {name: [list(shapes[name].full), shapes[name].split_dim] for name in names}
    header: dict[str, Any] = {"__metadata__": {"parameters": json.dumps(described, separators=(",", ":"))}}
    end = 0
    for found in ranges:
        begin, end = end, end + found.length * _BYTES
        header[found.key] = {"dtype": "F32", "shape": [found.length], "data_offsets": [begin, end]}
    return header


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stored:
    range: Range
    file: Any


class StateReader:
    """All state files of a checkpoint, opened together; tensors are read from the disk when they are asked for.

    Raises:
        CheckpointError: a file cannot be read, or the ranges leave elements out, overlap or contradict each other.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.folder = folder = checkpoint / STATE_FOLDER
        self.shapes: dict[str, ParameterShape] = {}
        self._stored: dict[tuple[str, str], list[_Stored]] = {}
        self._files = ExitStack()
        try:
            paths = sorted(folder.glob("rank-*.safetensors"))
            if not paths:
                raise CheckpointError(f"{folder}: holds no state of a run (rank-NNNNN.safetensors)")
            for path in paths:
                self._open(path)
            for stored in self._stored.values():
                self._check_complete(stored)
        except BaseException:
            self._files.close()
            raise

    def __enter__(self) -> StateReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._files.close()

    def read_full(self, name: str, kind: str = WEIGHT) -> Tensor:
        """The whole parameter or moment, fp32 on the CPU in its full shape."""
        stored = self._of(name, kind)
        num_parts, shape = stored[0].range.num_parts, self.shapes[name]
        part_shape = shape.part_shape(num_parts)
        size = torch.Size(part_shape).numel()
        return shape.join([self._gather(stored, part, 0, size).view(part_shape) for part in range(num_parts)])

    def read_range(self, wanted: Range, shape: ParameterShape) -> Tensor:
        """Values [N] of a range, in whatever ranges and parts they are stored.

        Args:
            shape: the parameter's in the layout of the range: a file does not know a split that its writer had not.
        """
        stored = self._of(wanted.name, wanted.kind)
        if stored[0].range.num_parts == wanted.num_parts:
            return self._gather(stored, wanted.part, wanted.start, wanted.stop)
        part = shape.part_of(self.read_full(wanted.name, wanted.kind), wanted.part, wanted.num_parts)
        return part.flatten()[wanted.start : wanted.stop]

    def _of(self, name: str, kind: str) -> list[_Stored]:
        try:
            return self._stored[name, kind]
        except KeyError:
            raise CheckpointError(f"{self.folder}: holds no {kind} of parameter {name}") from None

    @staticmethod
    def _gather(stored: list[_Stored], part: int, start: int, stop: int) -> Tensor:
        values_N = torch.empty(stop - start)
        for item in stored:
            found = item.range
            low, high = max(start, found.start), min(stop, found.stop)
            if found.part == part and low < high:
                piece = item.file.get_slice(found.key)[low - found.start : high - found.start]
                values_N[low - start : high - start] = piece
        return values_N

    def _open(self, path: Path) -> None:
        try:
            file = self._files.enter_context(safe_open(path, framework="pt"))
            described = dict(json.loads((file.metadata() or {})["parameters"]))
            shapes = {name: ParameterShape(tuple(full), split) for name, (full, split) in described.items()}
            for key in file.keys():  # noqa: SIM118  # not a dict
                view = file.get_slice(key)
                (length,) = view.get_shape()
                found = Range.parse(key, length)
                if view.get_dtype() != "F32" or found.name not in shapes:
                    raise ValueError(f"{key!r} is {view.get_dtype()}, or of no parameter that the header describes")
                self._stored.setdefault((found.name, found.kind), []).append(_Stored(found, file))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: cannot be read as state: {type(error).__name__}: {error}") from None
        for name, shape in shapes.items():
            if self.shapes.setdefault(name, shape) != shape:
                raise CheckpointError(f"{path}: {name} is {shape} here and {self.shapes[name]} in another file")

    def _check_complete(self, stored: list[_Stored]) -> None:
        """Every element once: the ranges of each part follow each other from its first element to its last."""
        stored.sort(key=lambda item: (item.range.part, item.range.start))
        first = stored[0].range
        size = torch.Size(self.shapes[first.name].part_shape(first.num_parts)).numel()
        part, start = 0, 0
        for item in stored:
            found = item.range
            if (found.part, found.start) != (part, start) or found.num_parts != first.num_parts or found.stop > size:
                raise CheckpointError(f"{self.folder}: elements are missing or there twice before {found.key}")
            part, start = (part, found.stop) if found.stop < size else (part + 1, 0)
        if part < first.num_parts:
            raise CheckpointError(
                f"{self.folder}: {first.kind} of {first.name} lacks elements from {start} on of part {part} of "
                f"{first.num_parts}; is a rank's file missing?"
            )
