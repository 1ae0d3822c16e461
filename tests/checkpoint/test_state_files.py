"""State files: what any cut into parts and ranges wrote, any other cut reads; every element exactly once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from state_ranges import write
from torch import Tensor

from pretrain.checkpoint.state_files import MOMENTS, WEIGHT, Range, StateReader, read_counters, write_counters
from pretrain.durable import HashingFile, record_of
from pretrain.errors import CheckpointError
from pretrain.model.parameter_shape import ParameterShape

SHAPE = ParameterShape((7, 6), split_dim=1)
FULL = torch.arange(42.0).view(7, 6)


def cut(
    full: Tensor, name: str, shape: ParameterShape, num_parts: int, bounds: list[int]
) -> list[tuple[Range, Tensor]]:
    """All ranges of a parameter, each part cut at the same places."""
    found = []
    for part in range(num_parts):
        flat = shape.part_of(full, part, num_parts).flatten()
        places = [0, *sorted({min(bound, len(flat)) for bound in bounds} - {0, len(flat)}), len(flat)]
        for start, stop in zip(places, places[1:], strict=False):
            found.append((Range(WEIGHT, name, part, num_parts, start, stop - start), flat[start:stop]))
    return found


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    parts=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    num_files=st.integers(1, 3),
)
def test_any_cut_is_read_by_any_other(
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    shape: list[int],
    parts: tuple[int, int],
    num_files: int,
) -> None:
    folder = tmp_path_factory.mktemp("state")
    split_dim = data.draw(st.none() | st.integers(0, len(shape) - 1))
    described = ParameterShape(tuple(shape), split_dim)
    written, wanted = parts if split_dim is not None else (1, 1)
    full = torch.arange(float(np.prod(shape))).view(shape)
    ranges = cut(full, "w", described, written, data.draw(st.lists(st.integers(0, 100), max_size=4)))
    for number in range(num_files):
        write(folder, number, ranges[number::num_files], {"w": described})
    with StateReader(folder) as reader:
        assert torch.equal(reader.read_full("w"), full)
        for part in range(wanted):
            flat = described.part_of(full, part, wanted).flatten()
            start = data.draw(st.integers(0, len(flat)))
            stop = data.draw(st.integers(start, len(flat)))
            found = reader.read_range(Range(WEIGHT, "w", part, wanted, start, stop - start), described)
            assert torch.equal(found, flat[start:stop])


def test_a_file_is_plain_safetensors_and_its_record_is_its_hash(tmp_path: Path) -> None:
    record = write(tmp_path, 3, cut(FULL, "a.weight", SHAPE, 2, [5]), {"a.weight": SHAPE})
    assert record.name == "state/rank-00003.safetensors"
    assert record == record_of(tmp_path / record.name, tmp_path)
    tensors = load_file(tmp_path / record.name)
    assert set(tensors) == {f"weight|a.weight|{part}/2|{start}" for part in (0, 1) for start in (0, 5)}


def test_other_types_are_stored_as_fp32(tmp_path: Path) -> None:
    shape = ParameterShape((4,))
    values = torch.tensor([1.0, -2.5, 3e30, 0.0])
    ranges = [
        (Range(kind, "b", 0, 1, 0, 4), values.to(dtype))
        for kind, dtype in zip((WEIGHT, *MOMENTS), (torch.float32, torch.bfloat16, torch.float64), strict=True)
    ]
    write(tmp_path, 0, ranges, {"b": shape})
    with StateReader(tmp_path) as reader:
        assert torch.equal(reader.read_full("b"), values)
        assert torch.equal(reader.read_full("b", "exp_avg"), values.bfloat16().float())
        assert torch.equal(reader.read_full("b", "exp_avg_sq"), values)


def test_a_part_of_padded_words_has_zeros_which_the_full_tensor_lacks(tmp_path: Path) -> None:
    words = ParameterShape((5, 2), split_dim=0)
    full = torch.arange(1.0, 11.0).view(5, 2)
    assert words.part_shape(4) == (2, 2)
    assert torch.equal(words.part_of(full, 3, 4), torch.zeros(2, 2))
    write(tmp_path, 0, cut(full, "word", words, 4, []), {"word": words})
    with StateReader(tmp_path) as reader:
        assert torch.equal(reader.read_full("word"), full)
        last = reader.read_range(Range(WEIGHT, "word", 1, 2, 0, 6), words)
    assert torch.equal(last, torch.tensor([7.0, 8.0, 9.0, 10.0, 0.0, 0.0]))


def test_what_was_written_whole_is_read_in_parts(tmp_path: Path) -> None:
    """One rank knows of no split."""
    write(tmp_path, 0, cut(FULL, "w", ParameterShape((7, 6)), 1, [10]), {"w": ParameterShape((7, 6))})
    with StateReader(tmp_path) as reader:
        found = reader.read_range(Range(WEIGHT, "w", 1, 3, 2, 9), SHAPE)
    assert torch.equal(found, FULL[:, 2:4].flatten()[2:11])


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    ranges = cut(FULL, "w", SHAPE, 2, [3])
    write(tmp_path, 0, ranges[:-1], {"w": SHAPE})
    with pytest.raises(CheckpointError, match="weight of w lacks elements from 3 on of part 1 of 2"):
        StateReader(tmp_path)
    write(tmp_path, 1, ranges[-1:], {"w": SHAPE})
    with StateReader(tmp_path) as reader, pytest.raises(CheckpointError, match="holds no exp_avg of parameter w"):
        reader.read_full("w", "exp_avg")


def test_counters_come_back(tmp_path: Path) -> None:
    counters = {"optimizer_steps": 7, "loss_scale": {"cur_scale": 65536.0}}
    record = write_counters(tmp_path, counters)
    assert record == record_of(tmp_path / "state" / "counters.json", tmp_path)
    assert read_counters(tmp_path) == counters


@pytest.mark.fault("full-disk")
@pytest.mark.parametrize("room", [0, 100, 200])
def test_a_full_disk_is_an_oserror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    written = HashingFile.write

    def limited(self: HashingFile, content: bytes) -> int:
        if self.num_bytes + len(content) > room:
            raise OSError(28, "No space left on device")
        return written(self, content)

    monkeypatch.setattr(HashingFile, "write", limited)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 0, cut(FULL, "w", SHAPE, 1, []), {"w": SHAPE})
