"""Checkpoints from strangers: nothing in them is executed, and nothing that contradicts itself is believed."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from state_ranges import write

from pretrain.errors import CheckpointError
from pretrain.model.parameter_shape import ParameterShape
from pretrain.state_files import STATE_FOLDER, WEIGHT, Range, StateReader, read_counters, state_file

SHAPES = {"w": ParameterShape((4, 3))}


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A checkpoint folder with one state file of one parameter."""
    write(tmp_path, 0, [(Range(WEIGHT, "w", 0, 1, 0, 12), torch.arange(12.0))], SHAPES)
    return tmp_path / STATE_FOLDER / state_file(0)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_in_the_place_of_state_is_refused_and_not_run(good: Path, tmp_path: Path, writer: str) -> None:
    canary = tmp_path / "canary"
    if writer == "torch":
        torch.save({"module": Canary(canary)}, good)
    else:
        good.write_bytes(pickle.dumps({"module": Canary(canary)}))
    good.with_name("counters.json").write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(CheckpointError, match="cannot be read as state"):
        StateReader(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_counters(tmp_path)
    assert not canary.exists()


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, -1])
def test_truncated_state_is_a_typed_error(good: Path, tmp_path: Path, keep: int) -> None:
    good.write_bytes(good.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors: cannot be read as state"):
        StateReader(tmp_path)


def _forge(path: Path, header: object, values: bytes = b"\0" * 48) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + values)


def _entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


METADATA = {"parameters": json.dumps({"w": [[4, 3], None]})}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"__metadata__": METADATA, "weight|w|0/1|0": _entry([11], 0, 44)}, "cannot be read"),
        ({"__metadata__": METADATA, "weight|w|0/1|1": _entry([12], 0, 48)}, "missing or there twice"),
        ({"__metadata__": METADATA, "weight|w|0/2|0": _entry([12], 0, 48)}, "lacks elements"),
        ({"__metadata__": METADATA, "weight|w|1/1|0": _entry([12], 0, 48)}, "out of range"),
        ({"__metadata__": METADATA, "code|w|0/1|0": _entry([12], 0, 48)}, "out of range"),
        ({"__metadata__": METADATA, "weight|v|0/1|0": _entry([12], 0, 48)}, "no parameter that the header describes"),
        ({"__metadata__": METADATA, "weight|w|0/1|0": _entry([3, 4], 0, 48)}, "cannot be read as state"),
        ({"__metadata__": METADATA, "weight|w|0/1|0": _entry([12], 0, 48, "I32")}, "is I32"),
        ({"__metadata__": METADATA, "weight": _entry([12], 0, 48)}, "cannot be read as state"),
        ({"__metadata__": METADATA, "weight|w|0/1|0": _entry([2**62], 0, 48)}, "cannot be read as state"),
        ({"weight|w|0/1|0": _entry([12], 0, 48)}, "cannot be read as state"),
        ({"__metadata__": {"parameters": "[1, 2]"}, "weight|w|0/1|0": _entry([12], 0, 48)}, "cannot be read as state"),
        ({"__metadata__": {"parameters": '{"w": [[-4, -3], 0]}'}, "weight|w|0/1|0": _entry([12], 0, 48)}, "shape"),
        ({"__metadata__": {"parameters": '{"w": [[4, 3], 7]}'}, "weight|w|0/1|0": _entry([12], 0, 48)}, "shape"),
        ({"__metadata__": {"parameters": '{"w": [[4, 3.5], 0]}'}, "weight|w|0/1|0": _entry([12], 0, 48)}, "shape"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(good: Path, tmp_path: Path, header: object, words: str) -> None:
    _forge(good, header)
    with pytest.raises(CheckpointError, match=words):
        StateReader(tmp_path)


def test_files_that_contradict_each_other_are_refused(good: Path, tmp_path: Path) -> None:
    write(tmp_path, 1, [(Range("exp_avg", "w", 0, 1, 0, 12), torch.zeros(12))], {"w": ParameterShape((3, 4))})
    with pytest.raises(CheckpointError, match="and .* in another file"):
        StateReader(tmp_path)
    write(tmp_path, 1, [(Range(WEIGHT, "w", 0, 1, 0, 12), torch.zeros(12))], SHAPES)
    with pytest.raises(CheckpointError, match="missing or there twice"):
        StateReader(tmp_path)


def test_no_state_at_all_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no state of a run"):
        StateReader(tmp_path)
