"""Micro-batches: a pure function of their number, over one or several datasets, without end; prefetching."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_builders import SPECIAL, tokenizer_info, write_dataset, write_lengths
from plain_versions import rows_of

from pretrain.data.batches import Batch, BatchSource, RowSource, prefetch
from pretrain.data.dataset.dataset_writer import IndexedDatasetWriter
from pretrain.data.dataset.indexed_dataset import IndexedDataset
from pretrain.errors import ConfigError, DataError


@pytest.fixture
def prefixes(tmp_path: Path) -> list[Path]:
    write_lengths(tmp_path / "a", [40, 0, 3, 1, 77], seed=1)
    write_lengths(tmp_path / "b", [25, 25], seed=2)
    return [tmp_path / "a", tmp_path / "b"]


def make_source(prefixes: list[Path], *, row_mode: Any = "stream", seq_length: int = 16, **changes: Any) -> BatchSource:
    options = {
        "micro_batch_size": 4,
        "seed": 7,
        "mask_rate": 0.15,
        "masking": "token",
        "mean_span_length": 3.0,
        "exclude_special": False,
        "shuffle": True,
    }
    return BatchSource(RowSource(prefixes, row_mode, seq_length), **{**options, **changes})


def assert_equal(one: Batch, other: Batch) -> None:
    for field in fields(Batch):
        assert np.array_equal(getattr(one, field.name), getattr(other, field.name)), field.name


def unmasked(batch: Batch) -> np.ndarray:
    ids = batch.input_ids_BL.copy()
    used = batch.masked_label_M != -100
    ids.ravel()[batch.masked_index_M[used]] = batch.masked_label_M[used]
    return ids


@pytest.mark.parametrize("row_mode", ["stream", "document"])
def test_rows_of_several_datasets_follow_one_another(prefixes: list[Path], row_mode: Any) -> None:
    expected = []
    for prefix in prefixes:
        dataset = IndexedDataset(prefix)
        documents = [dataset.document(i).tolist() for i in range(len(dataset))]
        expected += rows_of(documents, row_mode, 16)
    rows = RowSource(prefixes, row_mode, 16)
    assert rows.num_rows == len(expected)
    assert rows.num_tokens == 171
    assert rows.num_left_out == ((125 % 14) + (52 % 14) if row_mode == "stream" else 0)
    order = np.random.default_rng(0).permutation(rows.num_rows)
    ids, segment = rows.fill(order)
    assert ids.tolist() == [expected[i] for i in order]
    assert np.array_equal(segment, ids != 0)
    for row in (-1, rows.num_rows):
        with pytest.raises(IndexError):
            rows.fill(np.array([0, row]))


def test_shapes_and_types(prefixes: list[Path]) -> None:
    batch = make_source(prefixes).micro_batch(3)
    assert batch.micro_batch_index == 3
    for field in ("input_ids_BL", "segment_BL", "valid_BL"):
        assert getattr(batch, field).shape == (4, 16)
    for field in ("masked_index_M", "masked_label_M"):
        assert getattr(batch, field).shape == (4 * 2,)
    for field in ("input_ids_BL", "segment_BL", "masked_index_M", "masked_label_M"):
        assert getattr(batch, field).dtype == np.int64
    assert batch.valid_BL.dtype == np.bool_


def test_a_batch_lies_in_one_block_of_the_memory_it_is_given(prefixes: list[Path]) -> None:
    blocks: list[np.ndarray] = []

    def allocate(num_bytes: int) -> np.ndarray:
        blocks.append(np.full(num_bytes, 0xA5, np.uint8))
        return blocks[-1]

    batch = make_source(prefixes, allocate=allocate).micro_batch(2)
    assert_equal(batch, make_source(prefixes).micro_batch(2))
    arrays = [getattr(batch, field.name) for field in fields(Batch) if field.name != "micro_batch_index"]
    assert len(blocks) == 1
    assert sum(array.nbytes for array in arrays) == blocks[0].nbytes
    for number, array in enumerate(arrays):
        assert np.shares_memory(array, blocks[0])
        assert not any(np.shares_memory(array, other) for other in arrays[:number])


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_holds_every_row_once_and_the_stream_wraps_round(prefixes: list[Path], shuffle: bool) -> None:
    source = make_source(prefixes, shuffle=shuffle, micro_batch_size=3)
    num_rows = source.rows.num_rows
    assert num_rows % 3  # epochs begin inside micro-batches
    stream = np.concatenate([unmasked(source.micro_batch(i)) for i in range(num_rows)])
    rows = source.rows.fill(np.arange(num_rows))[0]
    for epoch in range(3):
        part = stream[epoch * num_rows : (epoch + 1) * num_rows]
        assert sorted(part.tolist()) == sorted(rows.tolist())
        assert np.array_equal(part, rows) is not shuffle
    masked = np.concatenate([source.micro_batch(i).input_ids_BL for i in range(num_rows)])
    if not shuffle:
        assert not np.array_equal(masked[:num_rows], masked[num_rows : 2 * num_rows])  # dynamic masks


def test_fewer_rows_than_a_micro_batch_wrap_round(tmp_path: Path) -> None:
    write_lengths(tmp_path / "v", [40])
    source = make_source([tmp_path / "v"], micro_batch_size=7, shuffle=False)
    assert source.rows.num_rows == 2
    ids = unmasked(source.micro_batch(0))
    assert np.array_equal(ids, ids[[0, 1, 0, 1, 0, 1, 0]])


def test_micro_batches_do_not_depend_on_order_or_thread(prefixes: list[Path]) -> None:
    source = make_source(prefixes)
    expected = [source.micro_batch(i) for i in range(30)]
    for i in np.random.default_rng(0).permutation(30):
        assert_equal(make_source(prefixes).micro_batch(int(i)), expected[i])
    with ThreadPoolExecutor(4) as executor:
        for batch, other in zip(executor.map(source.micro_batch, range(30)), expected, strict=True):
            assert_equal(batch, other)


@pytest.mark.parametrize("masking", ["token", "whole_word", "span"])
def test_rows_do_not_depend_on_the_micro_batch_size(prefixes: list[Path], masking: str) -> None:
    options = {"masking": masking, "continues_word": np.arange(100) >= 60}
    small, large = (make_source(prefixes, micro_batch_size=size, **options) for size in (2, 6))
    for field, width in (("input_ids_BL", 16), ("segment_BL", 16), ("valid_BL", 16), ("masked_label_M", 2)):
        one = np.concatenate([getattr(small.micro_batch(i), field).reshape(-1, width) for i in range(9)])
        other = np.concatenate([getattr(large.micro_batch(i), field).reshape(-1, width) for i in range(3)])
        assert np.array_equal(one, other), field


def test_valid_leaves_out_padding_and_on_request_special_tokens(prefixes: list[Path]) -> None:
    for exclude_special in (False, True):
        source = make_source(prefixes, row_mode="document", exclude_special=exclude_special)
        for i in range(5):
            batch = source.micro_batch(i)
            is_special = np.isin(unmasked(batch), [SPECIAL.cls, SPECIAL.sep])
            is_padding = batch.segment_BL == 0
            assert np.array_equal(batch.valid_BL, ~is_padding & ~(is_special & exclude_special))
    assert is_padding.any()


def test_masked_places_point_at_what_was_masked(prefixes: list[Path]) -> None:
    source = make_source(prefixes, shuffle=False)
    batch = source.micro_batch(0)
    original = source.rows.fill(np.arange(4))[0]
    used = batch.masked_label_M != -100
    assert used.sum() == 8
    assert np.array_equal(original.ravel()[batch.masked_index_M], np.where(used, batch.masked_label_M, original[0, 0]))
    assert np.array_equal(unmasked(batch), original)


# -- what cannot work --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "row_mode", "named"),
    [
        (
            [3, 4],
            "stream",
            "7 tokens in 2 documents give no complete row.*smaller data.seq_length.*document, more data",
        ),
        ([0, 0], "stream", "0 tokens in 2 documents.*use more data"),
        ([], "document", "0 tokens in 0 documents.*use more data"),
    ],
)
def test_a_dataset_without_a_row_is_refused(tmp_path: Path, lengths: list[int], row_mode: Any, named: str) -> None:
    write_lengths(tmp_path / "good", [100])
    write_lengths(tmp_path / "short", lengths)
    with pytest.raises(DataError, match=f"short: {named}"):
        RowSource([tmp_path / "good", tmp_path / "short"], row_mode, 16)


def write_with(prefix: Path, **changes: Any) -> None:
    info = {**vars(tokenizer_info()), **changes}
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        writer.add_document([np.arange(5, 50)])
        writer.finalize(tokenizer=type(tokenizer_info())(**info))


@pytest.mark.fault("tokenizer")
def test_datasets_of_different_tokenizers_are_refused(tmp_path: Path) -> None:
    write_with(tmp_path / "a")
    write_with(tmp_path / "renamed", name="copy.txt")
    write_with(tmp_path / "other", sha256="cd" * 32)
    write_with(tmp_path / "larger", vocab_size=200)
    assert RowSource([tmp_path / "a", tmp_path / "renamed"], "stream", 16).num_rows == 6
    with pytest.raises(DataError, match="other and .*a were written with different tokenizers: sha256 cdcd"):
        RowSource([tmp_path / "a", tmp_path / "other"], "stream", 16)
    with pytest.raises(DataError, match="different tokenizers: vocab_size 200 and 100"):
        RowSource([tmp_path / "a", tmp_path / "larger"], "stream", 16)


def test_a_vocabulary_of_special_tokens_only_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "unknown", [[[1] * 40]], vocab_size=5)
    with pytest.raises(DataError, match="all its 5 tokens are special"):
        make_source([tmp_path / "unknown"])


def test_a_dataset_without_a_manifest_and_no_dataset_are_refused(prefixes: list[Path]) -> None:
    Path(f"{prefixes[1]}.json").unlink()
    with pytest.raises(DataError, match=r"b\.json: no such manifest"):
        RowSource(prefixes, "stream", 16)
    with pytest.raises(DataError, match="at least one prefix"):
        RowSource([], "stream", 16)


@pytest.mark.fault("tokenizer")
def test_an_id_outside_the_vocabulary_is_a_data_error(prefixes: list[Path]) -> None:
    path = Path(f"{prefixes[0]}.bin")
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(DataError, match=r"a\.bin: token \d+ has id 65535, outside the vocabulary of 100 pieces"):
        make_source(prefixes[:1]).micro_batch(0)


def test_whole_words_need_word_boundaries(prefixes: list[Path]) -> None:
    with pytest.raises(ConfigError, match="whole_word"):
        make_source(prefixes, masking="whole_word")


# -- prefetching -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1, 3, 50])
def test_prefetching_changes_nothing(prefixes: list[Path], depth: int) -> None:
    source = make_source(prefixes)
    indices = [5, 0, 1, 9, 5]
    batches = list(prefetch(source, iter(indices), depth))
    assert [batch.micro_batch_index for batch in batches] == indices
    for batch in batches:
        assert_equal(batch, source.micro_batch(batch.micro_batch_index))


class Recorder:
    """Stands in for a batch source: counts what was prepared, fails at one number."""

    def __init__(self, fails_at: int = -1) -> None:
        self.fails_at = fails_at
        self.prepared: list[int] = []

    def micro_batch(self, index: int) -> int:
        if index == self.fails_at:
            raise DataError(f"micro-batch {index}")
        self.prepared.append(index)
        return index


@pytest.mark.parametrize("depth", [0, 2])
def test_an_exception_is_raised_in_the_consumer_at_its_place(depth: int) -> None:
    iterator = prefetch(Recorder(fails_at=3), range(10), depth)  # type: ignore[arg-type]
    assert [next(iterator) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="micro-batch 3"):
        next(iterator)
    assert list(iterator) == []


def test_no_more_than_depth_batches_are_ahead_and_the_thread_ends() -> None:
    source = Recorder()
    iterator = prefetch(source, range(1000), 3)  # type: ignore[arg-type]
    assert [next(iterator) for _ in range(2)] == [0, 1]
    iterator.close()  # type: ignore[attr-defined]
    assert len(source.prepared) <= 2 + 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("taco-data")]


# -- blending ----------------------------------------------------------------------------------------------------------


def test_a_blend_serves_rows_of_the_right_dataset_and_keeps_masks_by_epoch_and_sample(prefixes: list[Path]) -> None:
    source, plain = make_source(prefixes, weights=[0.25, 0.75]), make_source(prefixes)
    assert source.blend is not None
    for index in (0, 7, 10**6):
        positions = np.arange(index * source.micro_batch_size, (index + 1) * source.micro_batch_size)
        datasets, epochs, rows = source.blend.look_up(positions)
        samples = source.rows.starts[datasets] + rows
        assert (samples < source.rows.starts[datasets + 1]).all()
        batch = source.micro_batch(index)
        ids, _ = plain.rows.fill(samples)
        labels = batch.masked_label_M.reshape(len(samples), -1)
        columns = batch.masked_index_M.reshape(len(samples), -1) % source.rows.seq_length
        for row, (label, column) in enumerate(zip(labels, columns, strict=True)):
            used = label >= 0
            assert np.array_equal(ids[row, column[used]], label[used])
        assert epochs.min() >= 0


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0]])
def test_bad_weights_are_refused(prefixes: list[Path], weights: list[float]) -> None:
    with pytest.raises(ValueError, match="blend: "):
        make_source(prefixes, weights=weights)
