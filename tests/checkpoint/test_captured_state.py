"""A captured state: values that are no numbers are named, and copies share nothing with what they were made of."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pretrain.checkpoint.captured_state import CapturedState, HostMemory, find_non_finite
from pretrain.checkpoint.state_files import MOMENTS, WEIGHT, Range, StateReader
from pretrain.errors import CheckpointError
from pretrain.model.parameter_shape import ParameterShape

SHAPES = {"a": ParameterShape((3, 4)), "b": ParameterShape((5,))}


def state(dtype: torch.dtype = torch.float32) -> dict[Range, Tensor]:
    """Every value of a small model, all different."""
    return {
        Range(kind, name, 0, 1, 0, shape.num_elements): torch.arange(1.0, 1 + shape.num_elements).to(dtype) * factor
        for factor, kind in enumerate((WEIGHT, *MOMENTS), start=1)
        for name, shape in SHAPES.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("kind", "words"), [(WEIGHT, "weight"), ("exp_avg", "first moment"), ("exp_avg_sq", "second moment")]
)
def test_one_bad_value_anywhere_is_named(kind: str, words: str, bad: float, dtype: torch.dtype) -> None:
    found = state(dtype)
    assert find_non_finite(list(found), found.__getitem__) is None
    place = Range(kind, "a", 0, 1, 0, 12)
    for index in range(12):
        values = found[place].clone()
        values[index] = bad
        poisoned = {**found, place: values}
        problem = find_non_finite(list(poisoned), poisoned.__getitem__)
        assert problem == f"{words} of a: 1 of the 12 values from 0 on are NaN or infinite"


def test_the_largest_finite_values_are_no_fault() -> None:
    largest = torch.tensor([torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max, 0.0, -0.0, 1e-45])
    place = Range(WEIGHT, "b", 0, 1, 0, 5)
    assert find_non_finite([place], lambda _: largest) is None


def test_all_bad_values_are_counted_and_more_ranges_mentioned() -> None:
    found = {place: values * math.inf for place, values in state().items()}
    problem = find_non_finite(list(found), found.__getitem__)
    assert problem == "weight of a: 12 of the 12 values from 0 on are NaN or infinite; and 5 more"


def test_a_rank_with_nothing_to_write_has_no_fault() -> None:
    assert find_non_finite([], {}.__getitem__) is None


def test_copies_share_nothing_with_the_state_and_their_memory_is_used_again() -> None:
    memory, found = HostMemory(is_page_locked=False), state()
    expected = {place: values.clone() for place, values in found.items()}
    copies = memory.copy(list(found), found.__getitem__)
    for values in found.values():
        values.fill_(math.nan)
    assert all(torch.equal(copies(place), values) for place, values in expected.items())
    again = memory.copy(list(expected), expected.__getitem__)
    assert {again(place).data_ptr() for place in expected} == {copies(place).data_ptr() for place in expected}


def test_copies_of_16_bit_state_are_written_as_the_state_itself(tmp_path: Path) -> None:
    found = state(torch.bfloat16)
    copies = HostMemory(is_page_locked=False).copy(list(found), found.__getitem__)
    for name, values in (("state", found.__getitem__), ("copies", copies)):
        (tmp_path / name).mkdir()
        CapturedState(0, list(found), values, SHAPES, {"optimizer_steps": 3}, None).write(tmp_path / name)
    first, second = (sorted((tmp_path / name / "state").iterdir()) for name in ("state", "copies"))
    assert [path.name for path in first] == ["counters.json", "rank-00000.safetensors"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    with StateReader(tmp_path / "copies") as reader:
        assert torch.equal(reader.read_full("b", "exp_avg"), torch.arange(2.0, 11.0, 2.0))


def test_memory_that_is_not_there_is_told_with_what_to_do() -> None:
    too_much = Range(WEIGHT, "a", 0, 1, 0, 1 << 50)
    with pytest.raises(CheckpointError, match=r"4,503,599,627,370,496 bytes .* set checkpoint.asynchronous=false"):
        HostMemory(is_page_locked=False).reserve([too_much])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_state_on_a_gpu_is_copied_to_page_locked_memory_of_just_its_size() -> None:
    memory, found = HostMemory(is_page_locked=True), {place: values.cuda() for place, values in state().items()}
    copies = memory.copy(list(found), found.__getitem__)
    torch.cuda.synchronize()
    assert all(torch.equal(copies(place), values.cpu()) for place, values in found.items())
    assert copies(next(iter(found))).is_pinned()
    assert memory._flat.numel() == sum(place.length for place in found)
    first = next(iter(found))
    found[first][3] = math.nan
    assert find_non_finite(list(found), found.__getitem__) == (
        "weight of a: 1 of the 12 values from 0 on are NaN or infinite"
    )
