"""Where ZeRO keeps the state of a run: the fp32 weights and moments of each parameter that this rank is to update.

DeepSpeed flattens parameters and distributes them: stages 1 and 2 (and its bf16 optimizer) split the concatenation of a
group's parameters into one piece per data-parallel rank, stage 3 splits every parameter. Here each piece gets its name
back, so that `state_files.py` can write it and any other layout can read it.

Shape letters: N elements of a range.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from pretrain.checkpoint.state_files import MOMENTS, WEIGHT, Range, StateReader
from pretrain.errors import CheckpointError
from pretrain.model.parameter_shape import ParameterShape, parameter_shape
from pretrain.optim import initial_state
from pretrain.optim.segments import Segment
from pretrain.parallel.mesh import Mesh

TIED_WORD = "tied_modules.word.weight"
_LOSS_SCALE_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class Piece(NamedTuple):
    """Elements `start` to `start + length` of this rank's flattened part of a parameter, whose state is here.

    They are elements `offset` to `offset + length` of `optimized`, one of the tensors that the optimizer updates.
    """

    name: str
    start: int
    length: int
    optimized: Tensor
    offset: int


class ZeroState(ABC):
    """The pieces of one rank under one ZeRO stage.

    Args:
        engine: DeepSpeed's.
        shapes: of this rank's parameters; taken before ZeRO-3 empties them.
    """

    def __init__(self, engine: Any, mesh: Mesh, shapes: Mapping[str, ParameterShape]) -> None:
        self.engine = engine
        self.mesh = mesh
        self.shapes = shapes
        self._pieces = {piece.name: piece for piece in self._find_pieces()}

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that updates weights, inside DeepSpeed's wrappers."""
        return self.engine.basic_optimizer

    def pieces(self) -> list[Piece]:
        """What this rank updates, parameter by parameter."""
        return list(self._pieces.values())

    def ranges(self) -> list[Range]:
        """The ranges that this rank writes: every element of the model's state is written by exactly one rank."""
        shares = ((piece.name, *self._share(piece)) for piece in self._pieces.values())
        ranges = (
            self._range(kind, name, start, stop - start)
            for name, start, stop in shares
            if start < stop
            for kind in (WEIGHT, *MOMENTS)
        )
        return [state_range for state_range in ranges if state_range.length > 0]

    def values(self, state_range: Range) -> Tensor:
        """The elements [N] of a range of this rank, as a view; moments are zeros before the first step."""
        piece = self._pieces[state_range.name]
        tensor = piece.optimized.detach()
        if state_range.kind != WEIGHT:
            state = self.optimizer.state.get(piece.optimized)
            if not state:
                return tensor.new_zeros(state_range.length)
            tensor = state[state_range.kind]
        start = state_range.start - self._first_word(state_range.name)
        return tensor.view(-1).narrow(0, piece.offset + start - piece.start, state_range.length)

    def read(self, reader: StateReader, num_steps: int) -> None:
        """Set weights and moments from files, after `num_steps` optimizer steps; `refresh` must follow on all ranks.

        Raises:
            CheckpointError: the files belong to another model.
        """
        for name, shape in self.shapes.items():
            if name not in reader.shapes or reader.shapes[name].full != shape.full:
                stored = reader.shapes[name].full if name in reader.shapes else "none"
                raise CheckpointError(f"{reader.folder}: {name} is {stored}, the model of this run has {shape.full}")
        for tensor in self._optimized():
            self.optimizer.state[tensor] = initial_state(self.optimizer, tensor, num_steps)
        for piece in self._pieces.values():
            for kind in (WEIGHT, *MOMENTS):
                state_range = self._range(kind, piece.name, piece.start, piece.length)
                if state_range.length > 0:
                    self.values(state_range).copy_(reader.read_range(state_range, self.shapes[piece.name]))

    def num_steps(self) -> int:
        """Updates that the optimizer has made; skipped steps do not count.

        Raises:
            RuntimeError: parameters were updated different numbers of times, which no layout could load.
        """
        counts = {int(state["step"]) for tensor in self._optimized() if (state := self.optimizer.state.get(tensor))}
        if len(counts) > 1:
            raise RuntimeError(f"optimizer steps differ between parameters: {sorted(counts)}")
        return counts.pop() if counts else 0

    def segments(self) -> tuple[dict[Tensor, list[Segment]], list[bool]]:
        """Where the parameters are in each tensor that the optimizer updates, and which tensor parallelism splits.

        They are numbered in the order of the model, the same on all ranks of a pipeline stage.
        """
        numbers = {name: number for number, name in enumerate(self.shapes)}
        segments: dict[Tensor, list[Segment]] = {tensor: [] for tensor in self._optimized()}
        for piece in self._pieces.values():
            segments[piece.optimized].append(Segment(numbers[piece.name], piece.offset, piece.length))
        return segments, [shape.split_dim is not None for shape in self.shapes.values()]

    @abstractmethod
    def refresh(self) -> None:
        """Derive the weights that the model computes with from those that were set; collective."""

    @abstractmethod
    def _find_pieces(self) -> Iterator[Piece]: ...

    @abstractmethod
    def _optimized(self) -> list[Tensor]:
        """The tensors that the optimizer updates."""

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.engine.module.named_parameters()

    def _range(self, kind: str, name: str, start: int, length: int) -> Range:
        shape = self.shapes[name]
        if shape.num_rows is not None:
            # Parts of words are whole rows, so files hold the full parameter in one part, without unused rows.
            start += self._first_word(name)
            return Range(kind, name, 0, 1, start, max(0, min(length, shape.num_elements - start)))
        part, num_parts = (self.mesh.tp_rank, self.mesh.tp_size) if shape.split_dim is not None else (0, 1)
        return Range(kind, name, part, num_parts, start, length)

    def _first_word(self, name: str) -> int:
        """The element of the full word matrix or vocabulary bias where this rank's part begins; 0 for any other."""
        shape = self.shapes[name]
        if shape.num_rows is None or shape.split_dim is None:
            return 0
        return self.mesh.tp_rank * math.prod(shape.part_shape(self.mesh.tp_size))

    def _share(self, piece: Piece) -> tuple[int, int]:
        """Start and stop of what this rank writes of a piece: nothing if another rank writes the same."""
        is_copy = self.mesh.tp_rank > 0 and self.shapes[piece.name].split_dim is None
        is_tied_copy = self.mesh.pp_rank > 0 and piece.name == TIED_WORD
        return (0, 0) if is_copy or is_tied_copy else (piece.start, piece.start + piece.length)


class WholeState(ZeroState):
    """Without ZeRO: every data-parallel rank has the whole state, and writes its share."""

    def refresh(self) -> None:
        """Nothing to do: the model computes with these very tensors."""

    def _optimized(self) -> list[Tensor]:
        return [parameter for _, parameter in self._parameters()]

    def _find_pieces(self) -> Iterator[Piece]:
        for name, parameter in self._parameters():
            yield Piece(name, 0, parameter.numel(), parameter, 0)

    def _share(self, piece: Piece) -> tuple[int, int]:
        start, stop = super()._share(piece)
        length, rank, size = stop - start, self.mesh.dp_rank, self.mesh.dp_size
        return start + length * rank // size, start + length * (rank + 1) // size


class FlatState(ZeroState):
    """ZeRO-1, ZeRO-2 and the bf16 optimizer: each rank has a partition of the flat buffer of a parameter group."""

    def refresh(self) -> None:
        """Gather the 16-bit (or second fp32) weights from the partitions of all ranks."""
        self.engine.optimizer.update_lp_params()

    def gather(self) -> None:
        """Gather them from the partitions of all ranks as they are."""
        if self.mesh.dp_size > 1:
            group = self.mesh.data_group or distributed.group.WORLD
            for flat, own in zip(self.flats(), self.own_copies(), strict=True):
                distributed.all_gather_into_tensor(flat, own, group=group)

    def own_copies(self) -> list[Tensor]:
        """This rank's partitions of the weights that the model computes with; views of the flat buffers."""
        sizes = [partition.numel() for partition in self._optimized()]
        return [flat.narrow(0, self.mesh.dp_rank * size, size) for flat, size in zip(self.flats(), sizes, strict=True)]

    def partitions(self) -> list[Tensor]:
        """The fp32 weights that this rank updates: one flat tensor per group of the optimizer."""
        return self._optimized()

    def places(self) -> Iterator[tuple[nn.Parameter, int, int]]:
        """Each parameter with the number of its group, and its offset in the flat buffer of all partitions of that."""
        for _, parameter in self._parameters():
            yield parameter, *_place(parameter, self.flats())

    def flats(self) -> Sequence[Tensor]:
        """The weights that the model computes with: the partitions of all ranks, one flat tensor per group."""
        wrapper = self.engine.optimizer
        flats: Sequence[Tensor] = getattr(wrapper, "bf16_groups_flat", None) or wrapper.bit16_groups_flat
        return flats

    def _optimized(self) -> list[Tensor]:
        wrapper = self.engine.optimizer
        bf16 = getattr(wrapper, "fp32_groups_flat_partition", None)
        return list(wrapper.single_partition_of_fp32_groups if bf16 is None else bf16)

    def _find_pieces(self) -> Iterator[Piece]:
        # Only the place of a parameter's memory in the flat buffer of its group is reliable: DeepSpeed's own links to
        # fragments (`_hp_mapping`) assume the order of the group, which the round-robin option changes.
        partitions = self._optimized()
        for name, parameter in self._parameters():
            group, begin = _place(parameter, self.flats())
            first = self.mesh.dp_rank * partitions[group].numel()
            start, stop = max(begin, first), min(begin + parameter.numel(), first + partitions[group].numel())
            if start < stop:
                yield Piece(name, start - begin, stop - start, partitions[group], start - first)


def _place(parameter: Tensor, flats: Sequence[Tensor]) -> tuple[int, int]:
    """The number of the flat buffer that a parameter is a view of, and its offset there, in elements."""
    for group, flat in enumerate(flats):
        begin, rest = divmod(parameter.data_ptr() - flat.data_ptr(), flat.element_size())
        if 0 <= begin < flat.numel() and rest == 0:
            return group, begin
    raise RuntimeError("a parameter lies in none of DeepSpeed's flat buffers")


class PartitionedState(ZeroState):
    """ZeRO-3: a slice of every parameter; the last slice is padded."""

    def refresh(self) -> None:
        """Update the slices of the model's own weights from the fp32 ones, as after an optimizer step."""
        wrapper = self.engine.optimizer
        wrapper._partition_all_parameters()
        for group in range(len(wrapper.fp32_partitioned_groups_flat)):
            wrapper._reassign_or_swap_out_partitioned_parameters(group)
        wrapper._post_step(set())

    def _optimized(self) -> list[Tensor]:
        return list(self.engine.optimizer.fp32_partitioned_groups_flat)

    def _find_pieces(self) -> Iterator[Piece]:
        wrapper = self.engine.optimizer
        for name, parameter in self._parameters():
            group, offset, slice_length = wrapper.grad_position[wrapper.get_param_id(parameter)]
            start = slice_length * wrapper._get_param_partition_rank(parameter)
            length = min(slice_length, parameter.ds_numel - start)  # type: ignore[attr-defined]
            if length > 0:
                yield Piece(name, start, length, wrapper.fp32_partitioned_groups_flat[group], offset)


def zero_state(engine: Any, stage: int, mesh: Mesh, shapes: Mapping[str, ParameterShape]) -> ZeroState:
    """The state of a DeepSpeed engine that runs ZeRO `stage`."""
    classes: tuple[type[ZeroState], ...] = (WholeState, FlatState, FlatState, PartitionedState)
    return classes[stage](engine, mesh, shapes)


def describe_parameters(model: Any) -> dict[str, ParameterShape]:
    """Full shape and split of every parameter of a model or pipeline stage, by name."""
    return {name: parameter_shape(parameter, model.layers) for name, parameter in model.named_parameters()}


# -- counters ----------------------------------------------------------------------------------------------------------


def read_loss_scale(engine: Any) -> dict[str, float | int]:
    """The state of fp16's loss scaling; empty in other precisions."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is None or not getattr(scaler, "dynamic", False):
        return {}
    return {name: getattr(scaler, name) for name in _LOSS_SCALE_FIELDS}


def set_loss_scale(engine: Any, saved: Mapping[str, float | int]) -> None:
    """Restore the state of loss scaling; does nothing if this run or the saved one has none."""
    if read_loss_scale(engine):
        for name in saved.keys() & set(_LOSS_SCALE_FIELDS):
            setattr(engine.optimizer.loss_scaler, name, saved[name])
