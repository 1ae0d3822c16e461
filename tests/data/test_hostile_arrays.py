"""The C++ indexers under attack through Python: hostile numbers and arrays give the right answer or an exception.

Twenty thousand hostile cases more, at the speed of C++ and under sanitizers: csrc/tests/test_random_input.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_versions import Permutation

from pretrain.data.native import native
from pretrain.data.order import permute
from pretrain.data.sample_index import RowIds, RowIndex

REFUSED = (ValueError, IndexError, TypeError)
IDS = RowIds(vocab_size=100, cls=2, sep=3, pad=0)
SETTINGS = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
EDGES = [2**e + d for e in (31, 32, 61, 62, 63) for d in (-1, 0, 1)]
hostile = st.one_of(st.integers(-3, 40), st.sampled_from([*EDGES, *(-edge for edge in EDGES)]))
int64s = hostile.filter(lambda value: -(2**63) <= value < 2**63)
steps = st.lists(st.one_of(st.integers(0, 30), st.sampled_from([2**31, 2**32 + 1, 2**40, 2**60])), max_size=6)
MODES = st.sampled_from(["stream", "document"])


def plain_first_token(mode: str, offsets: list[int], capacity: int, row: int) -> int | None:
    """Where `row` begins in the tokens, in whole numbers of any size; None for a row that is not there."""
    filled = [(a, b) for a, b in zip(offsets, offsets[1:], strict=False) if b > a]
    if row < 0:
        return None
    if mode == "document":
        for first, end in filled:
            num_rows = -(-(end - first) // capacity)
            if row < num_rows:
                return first + row * capacity
            row -= num_rows
        return None
    place, line = row * capacity, sum(end - first + 1 for first, end in filled)
    if row >= line // capacity:
        return None
    for first, end in filled:
        if place <= end - first:
            return first + place
        place -= end - first + 1
    return None


def check_index(mode: str, offsets: list[int], seq_length: int, rows: list[int]) -> None:
    is_sound = bool(offsets) and offsets == sorted(offsets) and offsets[0] >= 0 and offsets[-1] <= 2**62
    try:
        index = RowIndex(mode, np.array(offsets, np.int64), seq_length)  # type: ignore[arg-type]
    except REFUSED:
        assert not (is_sound and 3 <= seq_length <= 2**30)
        return
    assert is_sound
    assert 3 <= seq_length <= 2**30
    for row in [*rows, 0, index.num_rows - 1, index.num_rows]:
        expected = plain_first_token(mode, offsets, seq_length - 2, row)
        try:
            found = index.first_tokens(np.array([row], np.int64))[0]
        except IndexError:
            found = None
        assert found == expected, row


def draw_and_check_index(data: st.DataObject) -> None:
    offsets = np.cumsum([data.draw(st.integers(0, 3)), *data.draw(steps)], dtype=object).tolist()
    if data.draw(st.booleans()) or offsets[-1] >= 2**63:
        offsets = data.draw(st.lists(int64s, max_size=6))
    seq_length = data.draw(st.one_of(st.integers(3, 40), hostile))
    check_index(data.draw(MODES), offsets, seq_length, data.draw(st.lists(int64s, max_size=4)))


@settings(SETTINGS, max_examples=300)
@given(data=st.data())
def test_hostile_offsets_and_rows(data: st.DataObject) -> None:
    draw_and_check_index(data)


@pytest.mark.soak
@settings(SETTINGS, max_examples=5_000)
@given(data=st.data())
def test_hostile_offsets_and_rows_at_length(data: st.DataObject) -> None:
    draw_and_check_index(data)


def check_order(seed: int, epoch: int, size: int, positions: list[int]) -> None:
    is_sound = 0 <= seed < 2**64 and 0 <= epoch < 2**32 and 1 <= size <= 2**62
    is_sound &= all(0 <= position < size for position in positions)
    try:
        found = permute(seed, epoch, np.array(positions, np.int64), size)
    except REFUSED:
        assert not is_sound
        return
    assert is_sound
    plain = Permutation(seed, epoch, size)
    assert found.tolist() == [plain(position) for position in positions]


order_cases = {
    "seed": st.one_of(hostile, st.integers(0, 2**64 - 1)),
    "epoch": hostile,
    "size": st.one_of(hostile, st.integers(1, 2**62)),
    "positions": st.lists(int64s, max_size=5),
}


@settings(SETTINGS, max_examples=300)
@given(**order_cases)
def test_hostile_orders(seed: int, epoch: int, size: int, positions: list[int]) -> None:
    check_order(seed, epoch, size, positions)


@pytest.mark.soak
@settings(SETTINGS, max_examples=5_000)
@given(**order_cases)
def test_hostile_orders_at_length(seed: int, epoch: int, size: int, positions: list[int]) -> None:
    check_order(seed, epoch, size, positions)


# -- arrays that are not what they should be ---------------------------------------------------------------------------


def unaligned(array: np.ndarray) -> np.ndarray:
    room = np.zeros(array.nbytes + 1, np.uint8)[1:]
    other = room.view(array.dtype).reshape(array.shape)
    other[...] = array
    return other


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    "nothing": lambda _: None,
    "number": lambda _: 7,
    "text": lambda _: "7",
    "bytes": lambda array: array.tobytes(),
    "list": lambda array: array.tolist(),
    "memoryview": memoryview,
    "floats": lambda array: array.astype(np.float64),
    "narrower": lambda array: array.astype(np.int32),
    "unsigned": lambda array: array.astype(np.uint64),
    "booleans": lambda array: array.astype(np.bool_),
    "complex": lambda array: array.astype(np.complex128),
    "objects": lambda array: array.astype(object),
    "other byte order": lambda array: array.astype(array.dtype.newbyteorder()),
    "records": lambda array: np.zeros(array.shape, [("a", np.int64)]),
    "dates": lambda array: array.astype("M8[s]"),
    "no dimension": lambda _: np.array(1),
    "one dimension more": lambda array: array[None],
    "empty": lambda array: array[:0],
    "shorter": lambda array: array[:-1].copy(),
    "longer": lambda array: np.concatenate([array, array]),
    "every second": lambda array: np.repeat(array, 2, axis=0)[::2],
    "backwards": lambda array: array[::-1],
    "broadcast": lambda array: np.broadcast_to(array[:1], array.shape),
    "unaligned": unaligned,
    "read only": read_only,
    "masked array": lambda array: np.ma.masked_array(array),
    "huge numbers": lambda array: np.full_like(array, 2**62),
    "negative numbers": lambda array: np.full_like(array, -(2**63)),
}


def call_fill(arguments: dict[str, Any]) -> list[Any]:
    index = RowIndex("stream", arguments.pop("offsets"), 6)
    index.fill(ids=IDS, **arguments)
    return [arguments["out_ids"].tolist(), arguments["out_segment"].tolist()]


def call_mask(arguments: dict[str, Any]) -> list[Any]:
    masker = native().Masker(
        seed=1,
        rate=0.5,
        kind="whole_word",
        mean_span_length=3.0,
        mask_id=4,
        is_special=arguments["is_special"],
        continues_word=arguments["continues_word"],
        ordinary_ids=arguments["ordinary_ids"],
    )
    index, labels = masker.mask_rows(arguments["ids"], arguments["samples"], arguments["epochs"], 3)
    return [arguments["ids"].tolist(), index.tolist(), labels.tolist()]


def good_arguments() -> dict[str, tuple[Callable[[dict[str, Any]], list[Any]], dict[str, np.ndarray]]]:
    """Per function a call and arrays that it takes."""
    return {
        "fill": (
            call_fill,
            {
                "offsets": np.array([0, 7, 20]),
                "tokens": np.arange(20) + 10,
                "rows": np.array([1, 3]),
                "out_ids": np.full((2, 6), 1),
                "out_segment": np.full((2, 6), 1),
            },
        ),
        "mask": (
            call_mask,
            {
                "ids": np.array([[2, 5, 6, 7, 3], [2, 8, 9, 9, 3]]),
                "samples": np.array([3, 4]),
                "epochs": np.array([0, 1]),
                "is_special": np.arange(10) < 5,
                "continues_word": np.arange(10) > 8,
                "ordinary_ids": np.arange(5, 10),
            },
        ),
        "permute": (lambda a: [permute(1, 0, a["positions"], 50).tolist()], {"positions": np.array([0, 7, 49])}),
        "first_tokens": (
            lambda a: [RowIndex("document", a["offsets"], 5).first_tokens(a["rows"]).tolist()],
            {"offsets": np.array([0, 7, 20]), "rows": np.array([0, 2, 6])},
        ),
    }


@pytest.mark.parametrize("num_predictions", [-(2**63), -1, 0, 6, 2**31, 2**61, 2**62, 2**63 - 1, 2**63, 1.5, None])
def test_room_for_predictions_is_checked_before_it_is_allocated(num_predictions: Any) -> None:
    masker = native().Masker(
        seed=1,
        rate=0.5,
        kind="token",
        mean_span_length=3.0,
        mask_id=4,
        is_special=np.arange(10) < 5,
        continues_word=np.empty(0, np.bool_),
        ordinary_ids=np.arange(5, 10),
    )
    zeros = np.zeros(8, np.int64)
    with pytest.raises(REFUSED):
        masker.mask_rows(np.full((8, 5), 6), zeros, zeros, num_predictions)  # 8 * 2**61 is 0 in 64 bits


CASES = [(name, key) for name, (_, arrays) in good_arguments().items() for key in arrays]
# An honest array may be read where it stands: these forms of it give the same answer.
HARMLESS = {"read only", "masked array"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "key"), CASES, ids=lambda value: value)
def test_arrays_of_another_form_are_refused(name: str, key: str, form: str) -> None:
    call, arrays = good_arguments()[name]
    expected = call({other: array.copy() for other, array in arrays.items()})
    try:
        changed = FORMS[form](arrays[key].copy())
    except (TypeError, ValueError):
        pytest.skip("this array has no such form")
    try:
        found = call({**{other: array.copy() for other, array in arrays.items()}, key: changed})
    except (*REFUSED, OverflowError):
        return
    if form in HARMLESS or (form == "shorter" and key in ("is_special", "continues_word")):
        assert found == expected
    else:
        # Other numbers of the right form are other input, and lead to an answer of the right shape.
        assert isinstance(changed, np.ndarray)
        assert changed.dtype == arrays[key].dtype or key == "tokens"
        assert changed.ndim == arrays[key].ndim
        assert changed.flags.c_contiguous
        assert changed.flags.aligned
