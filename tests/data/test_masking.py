"""Masks: equal to the plain version, exact counts, right shares, whole words whole, never a special token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_versions import mask_row

from pretrain.data.masking import Masker, predictions_per_row
from pretrain.errors import ConfigError

VOCAB_SIZE, MASK_ID = 60, 4
IS_SPECIAL = np.arange(VOCAB_SIZE) < 5
CONTINUES = np.arange(VOCAB_SIZE) >= 40
KINDS = ["token", "whole_word", "span"]


def make_masker(kind: str = "token", **changes: Any) -> Masker:
    options = {
        "seed": 1,
        "mask_rate": 0.15,
        "masking": kind,
        "mean_span_length": 3.0,
        "mask_id": MASK_ID,
        "is_special_V": IS_SPECIAL,
        "continues_word_V": CONTINUES,
    }
    return Masker(**{**options, **changes})


def mask(masker: Masker, ids: np.ndarray, num_predictions: int, first_sample: int = 0, epoch: int = 0) -> tuple:
    """Masked ids, index and label as [B, P], of samples first_sample, first_sample + 1, ..."""
    masked = ids.copy()
    samples = np.arange(first_sample, first_sample + len(ids))
    index, label = masker.mask(
        masked, samples_B=samples, epochs_B=np.full(len(ids), epoch), num_predictions=num_predictions
    )
    return masked, index.reshape(len(ids), -1), label.reshape(len(ids), -1)


def random_rows(num_rows: int, seq_length: int, seed: int = 0) -> np.ndarray:
    ids = np.random.default_rng(seed).integers(5, VOCAB_SIZE, (num_rows, seq_length))
    ids[:, 0], ids[:, -1] = 2, 3
    return ids


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    rows=st.integers(1, 30).flatmap(
        lambda length: st.lists(
            st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=length, max_size=length), min_size=1, max_size=3
        )
    ),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 2**32 - 1),
    sample=st.integers(0, 2**62),
    rate=st.floats(0.01, 1.0),
    mean=st.floats(1.0, 64.0),
)
def test_it_equals_the_plain_version(
    rows: list, kind: str, seed: int, epoch: int, sample: int, rate: float, mean: float
) -> None:
    ids = np.array(rows)
    num_predictions = predictions_per_row(rate, ids.shape[1])
    masker = make_masker(kind, seed=seed, mask_rate=rate, mean_span_length=mean)
    masked, index, label = mask(masker, ids, num_predictions, sample, epoch)
    for i, row in enumerate(rows):
        expected, columns = mask_row(
            row,
            seed=seed,
            epoch=epoch,
            sample=sample + i,
            rate=rate,
            kind=kind,
            mean=mean,
            mask_id=MASK_ID,
            special=set(np.flatnonzero(IS_SPECIAL).tolist()),
            continues=set(np.flatnonzero(CONTINUES).tolist()),
            vocab_size=VOCAB_SIZE,
            num_predictions=num_predictions,
        )
        unused = num_predictions - len(columns)
        assert masked[i].tolist() == expected
        assert index[i].tolist() == [i * len(row) + column for column in columns] + [0] * unused
        assert label[i].tolist() == [row[column] for column in columns] + [-100] * unused


@settings(deadline=None, derandomize=True)
@given(
    rows=st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=40, max_size=40), min_size=1, max_size=5),
    kind=st.sampled_from(KINDS),
    rate=st.floats(0.01, 1.0),
)
def test_what_always_holds(rows: list, kind: str, rate: float) -> None:
    ids = np.array(rows)
    num_predictions = predictions_per_row(rate, 40)
    masked, index, label = mask(make_masker(kind, mask_rate=rate), ids, num_predictions)
    for i, row in enumerate(ids):
        columns = index[i][label[i] != -100] - i * 40
        num_candidates = int((row >= 5).sum())
        budget = max(1, int(rate * num_candidates + 0.5)) if num_candidates else 0
        assert np.all(np.diff(columns) > 0)
        assert np.all(row[columns] >= 5)
        assert np.array_equal(label[i][: len(columns)], row[columns])
        assert np.all(label[i][len(columns) :] == -100)
        assert np.all(index[i][len(columns) :] == 0)
        untouched = np.setdiff1d(np.arange(40), columns)
        assert np.array_equal(masked[i][untouched], row[untouched])
        assert np.all((masked[i][columns] >= 5) | (masked[i][columns] == MASK_ID))
        if kind == "whole_word":
            assert len(columns) <= num_predictions
        else:
            assert len(columns) == budget


def assert_even(counts: np.ndarray) -> None:
    """Chi-square within four standard deviations of what even shares give."""
    freedom = counts.size - 1
    statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("kind", KINDS)
def test_shares_of_mask_random_and_unchanged(kind: str) -> None:
    ids = random_rows(2000, 130)
    masked, index, label = mask(make_masker(kind), ids, predictions_per_row(0.15, 128))
    used = label != -100
    after, before = masked.ravel()[index[used]], label[used]
    is_mask, is_same = after == MASK_ID, after == before
    count = used.sum()
    # A random id equals the original once in 55 ordinary ids.
    for share, expected in ((is_mask, 0.8), (is_same, 0.1 + 0.1 / 55), (~is_mask & ~is_same, 0.1 - 0.1 / 55)):
        assert abs(share.mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / count)
    random_ids = after[~is_mask & ~is_same]
    assert random_ids.min() >= 5
    assert_even(np.bincount(random_ids, minlength=VOCAB_SIZE)[5:])


def test_every_column_is_masked_equally_often() -> None:
    _, index, label = mask(make_masker(), random_rows(5000, 66), predictions_per_row(0.15, 64))
    columns = index[label != -100] % 66
    assert_even(np.bincount(columns, minlength=66)[1:65])


def words_of(row: np.ndarray) -> list[set[int]]:
    words: list[set[int]] = []
    for column, token in enumerate(row):
        if token < 5:
            continue
        if CONTINUES[token] and row[column - 1] >= 5:
            words[-1].add(column)
        else:
            words.append({column})
    return words


def test_whole_words_are_never_split() -> None:
    ids = random_rows(500, 66)
    ids[:, 30] = 3  # a separator inside the row ends a word
    _, index, label = mask(make_masker("whole_word"), ids, 10)
    num_masked = 0
    for i, row in enumerate(ids):
        chosen = set((index[i][label[i] != -100] - i * 66).tolist())
        num_masked += len(chosen)
        for word in words_of(row):
            assert word <= chosen or not word & chosen
    assert num_masked / 500 > 8.5  # budget 9; a word may overshoot to 10 or leave it short


def test_a_word_longer_than_the_row_has_room_for_is_left_alone() -> None:
    ids = np.array([[2, 10, *[50] * 12, 3]])
    assert np.all(mask(make_masker("whole_word"), ids, 3)[2] == -100)


def test_spans_have_the_geometric_mean() -> None:
    ids = random_rows(300, 2002)
    _, index, label = mask(make_masker("span", mask_rate=0.02, mean_span_length=4.0), ids, 40)
    runs = sum(1 + int((np.diff(row[used]) > 1).sum()) for row, used in zip(index, label != -100, strict=True))
    mean = (label != -100).sum() / runs
    capped_mean = (1 - 0.75**10) / 0.25  # of lengths up to 10; neighbours merge and budgets cut now and then
    assert abs(mean - capped_mean) < 0.25
    single = mask(make_masker("span", mask_rate=0.02, mean_span_length=1.0), ids, 40)[1]
    assert (np.diff(single) == 1).mean() < 0.04


def test_masks_follow_the_sample_not_the_row() -> None:
    ids = random_rows(6, 66)
    masker = make_masker()
    whole = mask(masker, ids, 10, first_sample=100)[0]
    for i in range(6):
        assert np.array_equal(mask(masker, ids[i : i + 1], 10, first_sample=100 + i)[0][0], whole[i])
    assert not np.array_equal(mask(masker, ids, 10, first_sample=100, epoch=1)[0], whole)
    assert not np.array_equal(mask(make_masker(seed=2), ids, 10, first_sample=100)[0], whole)


def test_rows_without_ordinary_tokens_have_no_masks() -> None:
    ids = np.array([[2, 3, 0, 0], [2, 3, 3, 3]])
    masked, index, label = mask(make_masker(), ids, 2)
    assert np.array_equal(masked, ids)
    assert not index.any()
    assert np.all(label == -100)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exclude_special", [False, True])
def test_a_batch_is_masked_as_its_rows_and_marks_valid_tokens_before(kind: str, exclude_special: bool) -> None:
    ids = random_rows(7, 66)
    ids[:, 40] = 3
    segment = np.repeat(np.arange(7)[:, None], 66, axis=1)
    masker, masked = make_masker(kind), ids.copy()
    valid, index, label = np.empty(ids.shape, bool), np.empty(70, np.int64), np.empty(70, np.int64)
    masker.mask_batch(
        masked, segment, samples_B=np.arange(7), epochs_B=np.zeros(7, np.int64), exclude_special=exclude_special,
        out_valid_BL=valid, out_index_M=index, out_label_M=label,
    )  # fmt: skip
    for found, expected in zip((masked, index, label), mask(masker, ids, 10), strict=True):
        assert np.array_equal(found.ravel(), expected.ravel())
    assert np.array_equal(valid, (segment > 0) & ~(IS_SPECIAL[ids] & exclude_special))


def test_outputs_of_another_shape_and_foreign_ids_are_refused() -> None:
    ids, samples = random_rows(2, 66), np.zeros(2, np.int64)
    segment, valid = np.ones((2, 66), np.int64), np.empty((2, 66), bool)

    def run(**changes: np.ndarray) -> None:
        given = {"out_valid_BL": valid, "out_index_M": np.empty(20, np.int64), "out_label_M": np.empty(20, np.int64)}
        options = {"samples_B": samples, "epochs_B": samples, "exclude_special": True, **given, **changes}
        make_masker().mask_batch(ids, segment, **options)  # type: ignore[arg-type]

    for name, wrong in (("out_valid", valid[:1]), ("out_labels", np.empty(18, np.int64)), ("samples", samples[:1])):
        key = {"out_valid": "out_valid_BL", "out_labels": "out_label_M", "samples": "samples_B"}[name]
        with pytest.raises(ValueError, match=name):
            run(**{key: wrong})
    with pytest.raises(ValueError, match="out_index"):
        run(out_index_M=np.empty(21, np.int64))
    ids[1, 5] = -1
    with pytest.raises(IndexError, match="token id -1 is outside the vocabulary of 60 pieces"):
        run()


def test_room_for_predictions_is_rounded_and_never_zero() -> None:
    assert [predictions_per_row(0.15, capacity) for capacity in (1, 6, 10, 126, 510)] == [1, 1, 2, 19, 77]


def test_bad_requests_are_refused() -> None:
    ids = random_rows(1, 66)
    with pytest.raises(ValueError, match="a row has 10 tokens to predict, room is for 5"):
        mask(make_masker(), ids, 5)
    with pytest.raises(ValueError, match="num_predictions must be at least 1"):
        mask(make_masker(), ids, 0)
    with pytest.raises(ValueError, match="sample must not be negative"):
        mask(make_masker(), ids, 10, first_sample=-1)
    with pytest.raises(ValueError, match="epoch must be 0"):
        mask(make_masker(), ids, 10, epoch=2**32)
    with pytest.raises(TypeError):
        mask(make_masker(), ids.astype(np.int32), 10)
    ids[0, 7] = VOCAB_SIZE
    with pytest.raises(IndexError, match="token id 60 is outside the vocabulary of 60 pieces"):
        mask(make_masker(), ids, 10)


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"mask_rate": 0.0}, ValueError, "rate must lie in"),
        ({"mask_rate": 1.01}, ValueError, "rate must lie in"),
        ({"mask_rate": float("nan")}, ValueError, "rate must lie in"),
        ({"mean_span_length": 0.5}, ValueError, "mean_span_length must be at least 1"),
        ({"mask_id": 60}, IndexError, "mask id 60 is outside the vocabulary"),
        ({"is_special_V": np.ones(60, bool)}, ValueError, "no ordinary id"),
        ({"masking": "words"}, ValueError, "expected token, whole_word or span, found words"),
        ({"masking": "whole_word", "continues_word_V": None}, ConfigError, "objective.masking=whole_word needs"),
        ({"masking": "whole_word", "continues_word_V": CONTINUES[:50]}, ConfigError, "50 pieces"),
    ],
)
def test_bad_policies_are_refused(changes: dict, error: type, named: str) -> None:
    with pytest.raises(error, match=named):
        make_masker(**changes)
