"""Files that hold the state of a run independently of its layout: what some ranks wrote, any others can read.

    state/
      rank-00000.safetensors     flat ranges of parameters and optimizer moments, written by rank 0
      rank-00001.safetensors     ...
      counters.json              optimizer steps, loss scale, skipped steps

A range is a one-dimensional fp32 tensor named KIND|NAME|PART/PARTS|START: elements START, START + 1, ... of the
flattened part PART of the parameter NAME, which PARTS tensor-parallel ranks share. KIND is `weight`, `exp_avg` or
`exp_avg_sq`. Every element of every parameter lies in exactly one range, whatever ZeRO stage, pipeline or number of
ranks wrote it; each file's header holds the full shapes of its parameters.

DeepSpeed's own files fit only the layout that wrote them, and its converters refuse some moves (ZeRO-3 to ZeRO-1) and
run pickles. These are plain safetensors: they hold no code and need no converter.

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
    """Some elements of a tensor: `start` counts in the flattened part `part` of `num_parts`."""

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
            ValueError: it is not a key of this format.
        """
        kind, name, parts, start = key.split("|")
        part, num_parts = parts.split("/")
        parsed = cls(kind, name, int(part), int(num_parts), int(start), length)
        if not (0 <= parsed.part < parsed.num_parts and parsed.start >= 0 and kind in (WEIGHT, *MOMENTS)):
            raise ValueError(f"{key!r} is out of range")
        return parsed


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
        values: gives the elements [N] of a range, of any float dtype and device; they are converted to fp32 in small
            pieces, so that memory never holds a second copy of the state.
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
        for state_range in ranges:
            for chunk in values(state_range).detach().split(_CHUNK_ELEMENTS):
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
    """The counters that `write_counters` wrote.

    Raises:
        CheckpointError: the file is missing or does not hold such a table.
    """
    path = checkpoint / STATE_FOLDER / COUNTERS_FILE
    try:
        counters = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(counters, dict):
            raise ValueError(f"expected a table, found {type(counters).__name__}")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    return counters


def _header(ranges: Sequence[Range], shapes: Mapping[str, ParameterShape]) -> dict[str, Any]:
    names = sorted({state_range.name for state_range in ranges})
    described = {name: [list(shapes[name].full), shapes[name].split_dim] for name in names}
    header: dict[str, Any] = {"__metadata__": {"parameters": json.dumps(described, separators=(",", ":"))}}
    end = 0
    for state_range in ranges:
        begin, end = end, end + state_range.length * _BYTES
        header[state_range.key] = {"dtype": "F32", "shape": [state_range.length], "data_offsets": [begin, end]}
    return header


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stored:
    range: Range
    file: Any


class StateReader:
    """All state files of a checkpoint, opened together; tensors are read from the disk on request.

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
        stored = self._find(name, kind)
        num_parts, shape = stored[0].range.num_parts, self.shapes[name]
        part_shape = shape.part_shape(num_parts)
        size = torch.Size(part_shape).numel()
        return shape.join([self._gather(stored, part, 0, size).view(part_shape) for part in range(num_parts)])

    def read_range(self, state_range: Range, shape: ParameterShape) -> Tensor:
        """Values [N] of a range, whatever ranges and parts the files hold.

        Args:
            shape: the parameter's shape in the layout of the range: a file only knows the split of its own layout.
        """
        stored = self._find(state_range.name, state_range.kind)
        if stored[0].range.num_parts == state_range.num_parts:
            return self._gather(stored, state_range.part, state_range.start, state_range.stop)
        part = shape.part_of(
            self.read_full(state_range.name, state_range.kind), state_range.part, state_range.num_parts
        )
        return part.flatten()[state_range.start : state_range.stop]

    def _find(self, name: str, kind: str) -> list[_Stored]:
        try:
            return self._stored[name, kind]
        except KeyError:
            raise CheckpointError(f"{self.folder}: holds no {kind} of parameter {name}") from None

    @staticmethod
    def _gather(stored: list[_Stored], part: int, start: int, stop: int) -> Tensor:
        values_N = torch.empty(stop - start)
        for entry in stored:
            span = entry.range
            low, high = max(start, span.start), min(stop, span.stop)
            if span.part == part and low < high:
                piece = entry.file.get_slice(span.key)[low - span.start : high - span.start]
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
                state_range = Range.parse(key, length)
                if view.get_dtype() != "F32" or state_range.name not in shapes:
                    raise ValueError(f"{key!r} is {view.get_dtype()}, or of no parameter that the header describes")
                self._stored.setdefault((state_range.name, state_range.kind), []).append(_Stored(state_range, file))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: cannot be read as state: {type(error).__name__}: {error}") from None
        for name, shape in shapes.items():
            if self.shapes.setdefault(name, shape) != shape:
                raise CheckpointError(f"{path}: {name} is {shape} here and {self.shapes[name]} in another file")

    def _check_complete(self, stored: list[_Stored]) -> None:
        """Every element once: the ranges of each part follow each other from its first element to its last."""
        stored.sort(key=lambda entry: (entry.range.part, entry.range.start))
        first = stored[0].range
        size = torch.Size(self.shapes[first.name].part_shape(first.num_parts)).numel()
        part, start = 0, 0
        for entry in stored:
            span = entry.range
            if (span.part, span.start) != (part, start) or span.num_parts != first.num_parts or span.stop > size:
                raise CheckpointError(f"{self.folder}: elements are missing or there twice before {span.key}")
            part, start = (part, span.stop) if span.stop < size else (part + 1, 0)
        if part < first.num_parts:
            raise CheckpointError(
                f"{self.folder}: {first.kind} of {first.name} lacks elements from {start} on of part {part} of "
                f"{first.num_parts}; is a rank's file missing?"
            )
