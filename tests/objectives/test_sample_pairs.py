"""The pairs of the contrastive loss: their distribution, their limits, and that they are a pure function."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain.errors import ConfigError
from pretrain.objectives.taco import anchor_mask, sample_pairs


def _draw(valid_BL: Tensor, **changes: object) -> tuple[Tensor, Tensor]:
    arguments: dict = {"window": 2, "num_negatives": 5, "seed": 7, "micro_batch_index": 3, **changes}
    return sample_pairs(valid_BL, **arguments)


def _all_valid(num_rows: int, length: int) -> Tensor:
    return torch.ones(num_rows, length, dtype=torch.bool)


def _assert_uniform(counts: Tensor) -> None:
    """Chi-square of counts against equal shares, far in the tail (mean k - 1, deviation sqrt(2 (k - 1)))."""
    freedom = len(counts) - 1
    mean = counts.sum().double() / len(counts)
    statistic = ((counts - mean) ** 2 / mean).sum()
    assert statistic < freedom + 6 * (2 * freedom) ** 0.5 + 6, counts


# -- distribution ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 4])
def test_offsets_inside_a_row_are_uniform(window: int) -> None:
    length = 4000
    positive_BL, _ = _draw(_all_valid(4, length), window=window)
    inner = torch.arange(window, length - window)
    offset = (positive_BL[:, inner] - inner).flatten()
    assert set(offset.tolist()) == set(range(-window, window + 1)) - {0}
    _assert_uniform(torch.bincount(offset + window)[[i for i in range(2 * window + 1) if i != window]])


def test_an_offset_that_leaves_the_row_falls_back_to_any_other_token() -> None:
    # Column 0, window 2: half of the draws stay inside (columns 1, 2), half fall back to 1 .. L - 1.
    length, num_rows = 12, 30_000
    positive_BL, _ = _draw(_all_valid(num_rows, length), num_negatives=1)
    counts = torch.bincount(positive_BL[:, 0], minlength=length)
    assert counts[0] == 0
    _assert_uniform(counts[3:])
    expected_far = num_rows * 0.5 / (length - 1)
    assert abs(float(counts[3:].double().mean()) / expected_far - 1) < 0.05
    expected_near = num_rows * 0.25 + expected_far
    assert abs(float(counts[1:3].double().mean()) / expected_near - 1) < 0.05


def test_an_offset_that_meets_an_invalid_token_falls_back_to_any_other_valid_one() -> None:
    valid_BL = _all_valid(20_000, 9)
    valid_BL[:, [2, 3, 5, 6]] = False  # column 4 is alone in its window: 0, 1, 7, 8 remain
    positive_BL, _ = _draw(valid_BL, num_negatives=1)
    counts = torch.bincount(positive_BL[:, 4], minlength=9)
    assert counts[[2, 3, 4, 5, 6]].sum() == 0
    _assert_uniform(counts[[0, 1, 7, 8]])


def test_a_positive_stays_inside_its_document() -> None:
    segment_BL = torch.tensor([[1, 1, 1, 2, 2, 3, 0, 0]]).repeat(5000, 1)
    positive_BL, _ = _draw(segment_BL > 0, segment_BL=segment_BL, num_negatives=1)
    assert set(positive_BL[:, 2].tolist()) == {0, 1}
    assert set(positive_BL[:, 3].tolist()) == {4}
    assert set(positive_BL[:, 5].tolist()) == {-1}  # alone in its document
    assert set(positive_BL[:, 6].tolist()) == {-1}
    _assert_uniform(torch.bincount(positive_BL[:, 1])[[0, 2]])


def test_negatives_are_uniform_over_the_valid_tokens_of_other_rows() -> None:
    valid_BL = _all_valid(4, 6)
    valid_BL[1, 3:] = False
    valid_BL[2] = False
    _, negative_BLK = _draw(valid_BL, num_negatives=20_000)
    for row in (0, 1, 3):
        allowed = valid_BL.clone()
        allowed[row] = False
        counts = torch.bincount(negative_BLK[row][valid_BL[row]].flatten(), minlength=24)
        assert counts[~allowed.flatten()].sum() == 0
        _assert_uniform(counts[allowed.flatten()])


def test_negatives_of_one_anchor_and_of_neighbours_are_independent() -> None:
    # Pairs of draws over 2 rows x 4 tokens are uniform over 4 x 4 cells.
    _, negative_BLK = _draw(_all_valid(2, 4), num_negatives=8000)
    first, second = negative_BLK[0, 0] - 4, negative_BLK[0, 1] - 4
    _assert_uniform(torch.bincount(first * 4 + second, minlength=16))
    _assert_uniform(torch.bincount(first[:-1] * 4 + first[1:], minlength=16))


# -- a pure function ---------------------------------------------------------------------------------------------------


def test_equal_arguments_give_equal_pairs_whatever_happened_before() -> None:
    valid_BL = _all_valid(4, 16)
    before = _draw(valid_BL)
    state = torch.get_rng_state()
    torch.rand(10)
    _draw(valid_BL, micro_batch_index=99)
    after = _draw(valid_BL)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    torch.set_rng_state(state)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    _draw(_all_valid(3, 8))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("change", [{"seed": 8}, {"seed": 7 + 2**32}, {"micro_batch_index": 3 + 2**32}])
def test_every_key_matters(change: dict[str, int]) -> None:
    valid_BL = _all_valid(4, 64)
    positive_BL, negative_BLK = _draw(valid_BL)
    other_positive_BL, other_negative_BLK = _draw(valid_BL, **change)
    assert (positive_BL == other_positive_BL).double().mean() < 0.5
    assert (negative_BLK == other_negative_BLK).double().mean() < 0.1


def test_pinned_values() -> None:
    """The stream of pairs is part of a run's identity: a change here changes every resumed run."""
    positive_BL, negative_BLK = _draw(_all_valid(2, 4), num_negatives=2, seed=1234, micro_batch_index=0)
    assert positive_BL.tolist() == [[2, 0, 0, 2], [1, 2, 0, 1]]
    assert negative_BLK.tolist() == [[[6, 4], [7, 6], [4, 6], [7, 5]], [[1, 3], [0, 2], [0, 2], [1, 1]]]


# -- limits ------------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_pair_is_legal(data: st.DataObject) -> None:
    num_rows, length = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 9))
    flags = st.lists(st.booleans(), min_size=num_rows * length, max_size=num_rows * length)
    numbers = st.lists(st.integers(0, 3), min_size=num_rows * length, max_size=num_rows * length)
    valid_BL = torch.tensor(data.draw(flags)).view(num_rows, length)
    segment_BL = torch.tensor(data.draw(numbers)).view(num_rows, length) if data.draw(st.booleans()) else None
    positive_BL, negative_BLK = _draw(
        valid_BL,
        segment_BL=segment_BL,
        window=data.draw(st.integers(1, 12)),
        num_negatives=data.draw(st.integers(1, 9)),
        seed=data.draw(st.integers(0, 2**63 - 1)),
        micro_batch_index=data.draw(st.integers(0, 2**40)),
    )
    groups = torch.zeros_like(valid_BL, dtype=torch.int64) if segment_BL is None else segment_BL
    for row in range(num_rows):
        for column in range(length):
            is_valid = bool(valid_BL[row, column])
            same = valid_BL[row] & (groups[row] == groups[row, column])
            partners = set(same.nonzero().flatten().tolist()) - {column}
            positive = int(positive_BL[row, column])
            assert positive in partners if is_valid and partners else positive == -1
            others = valid_BL.clone()
            others[row] = False
            allowed = set(others.flatten().nonzero().flatten().tolist())
            negatives = set(negative_BLK[row, column].tolist())
            assert negatives <= allowed if is_valid and allowed else negatives == {-1}


@pytest.mark.fault("degenerate-batch")
def test_no_valid_token_gives_no_pairs() -> None:
    positive_BL, negative_BLK = _draw(~_all_valid(2, 3))
    assert (positive_BL == -1).all()
    assert (negative_BLK == -1).all()
    assert negative_BLK.shape == (2, 3, 5)


@pytest.mark.fault("degenerate-batch")
def test_one_row_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"micro_batch_size \(1\).*raise train.micro_batch_size"):
        _draw(_all_valid(1, 8))


@pytest.mark.parametrize(
    ("valid_BL", "changes", "words"),
    [
        (torch.ones(2, 3), {}, "valid_BL"),
        (torch.ones(6, dtype=torch.bool), {}, "valid_BL"),
        (_all_valid(2, 3), {"window": 0}, "window"),
        (_all_valid(2, 3), {"num_negatives": 0}, "num_negatives"),
        (_all_valid(2, 3), {"seed": -1}, "seed"),
        (_all_valid(2, 3), {"micro_batch_index": -1}, "micro_batch_index"),
        (_all_valid(2, 3), {"segment_BL": torch.ones(2, 4, dtype=torch.int64)}, "segment_BL"),
        (_all_valid(2, 3), {"segment_BL": torch.ones(2, 3)}, "segment_BL"),
    ],
)
def test_wrong_arguments_are_named(valid_BL: Tensor, changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _draw(valid_BL, **changes)


def test_anchor_masks() -> None:
    valid_BL = torch.tensor([[True, True, True, False]])
    masked_BL = torch.tensor([[True, False, False, True]])
    assert anchor_mask("all", masked_BL, valid_BL).tolist() == [[True, True, True, False]]
    assert anchor_mask("masked", masked_BL, valid_BL).tolist() == [[True, False, False, False]]
    assert anchor_mask("unmasked", masked_BL, valid_BL).tolist() == [[False, True, True, False]]
    with pytest.raises(ConfigError, match="objective.anchors"):
        anchor_mask("some", masked_BL, valid_BL)  # type: ignore[arg-type]
