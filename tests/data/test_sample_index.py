"""The C++ sample index against plain Python, what it refuses, and a missing build."""

from __future__ import annotations

import sys
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_versions import rows_of
from project import ROOT

import pretrain.data.native as module
from pretrain.data.native_build import sources_digest
from pretrain.data.sample_index import RowIds, RowIndex
from pretrain.errors import MissingExtensionError

IDS = RowIds(vocab_size=100, cls=2, sep=3, pad=0)
DTYPES = ["uint16", "int32", "uint8", "int8", "int16", "int64"]
corpora = st.lists(st.lists(st.integers(5, 99), max_size=30), max_size=12)


def offsets_of(documents: list[list[int]]) -> np.ndarray:
    return np.array([0, *accumulate(map(len, documents))], np.int64)


def fill(index: RowIndex, tokens: np.ndarray, rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
    ids, segment = (np.full((len(rows), index.seq_length), -1, np.int64) for _ in range(2))
    index.fill(tokens, np.array(rows, np.int64), IDS, out_ids=ids, out_segment=segment)
    return ids, segment


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    documents=corpora,
    mode=st.sampled_from(["stream", "document"]),
    seq_length=st.integers(3, 40),
    dtype=st.sampled_from(DTYPES),
)
def test_rows_equal_the_plain_version(documents: list, mode: str, seq_length: int, dtype: str) -> None:
    expected = rows_of(documents, mode, seq_length)
    index = RowIndex(mode, offsets_of(documents), seq_length)
    assert index.num_rows == len(expected)
    tokens = np.array([token for document in documents for token in document], dtype)
    ids, segment = fill(index, tokens, list(range(index.num_rows)))
    assert ids.tolist() == expected
    assert segment.tolist() == [[int(token != 0) for token in row] for row in expected]
    num_line = sum(len(document) + 1 for document in documents if document)
    assert index.num_left_out == (num_line - index.num_rows * (seq_length - 2) if mode == "stream" else 0)


@settings(deadline=None, derandomize=True)
@given(documents=corpora, mode=st.sampled_from(["stream", "document"]), seq_length=st.integers(3, 40))
def test_every_token_stands_in_exactly_one_row(documents: list, mode: str, seq_length: int) -> None:
    index = RowIndex(mode, offsets_of(documents), seq_length)
    tokens = np.array([token for document in documents for token in document], np.uint16)
    ids, _ = fill(index, tokens, list(range(index.num_rows)))
    read = ids[ids >= 5].tolist()
    assert read == tokens.tolist()[: len(read)]
    assert len(tokens) - len(read) <= index.num_left_out


def test_rows_begin_where_they_say() -> None:
    index = RowIndex("stream", np.array([0, 4, 4, 9]), 5)  # a b c d S e f g h i S
    assert index.first_tokens(np.arange(3)).tolist() == [0, 3, 5]
    index = RowIndex("document", np.array([0, 4, 4, 9]), 5)
    assert index.first_tokens(np.arange(4)).tolist() == [0, 3, 4, 7]


def test_positions_beyond_32_bits_are_right() -> None:
    """A token array that is only pretended: places around 2^31 and 2^33 are computed, nothing is read."""
    length = 2**33 + 5
    index = RowIndex("stream", np.array([0, length, 2 * length]), 512)
    assert index.num_rows == (2 * length + 2) // 510
    for row in (2**31 // 510, 2**31 // 510 + 1, 2**32 // 510, length // 510, index.num_rows - 1):
        place = row * 510
        assert index.first_tokens(np.array([row]))[0] == place - (place > length)
    huge = RowIndex("document", np.array([0, 2**62]), 3)
    assert huge.num_rows == 2**62
    assert huge.first_tokens(np.array([2**62 - 1]))[0] == 2**62 - 1


def test_memory_is_about_eight_bytes_per_document() -> None:
    offsets = np.arange(100_001, dtype=np.int64) * 7
    for mode, size in (("stream", 8), ("document", 16)):
        assert size * 100_001 < RowIndex(mode, offsets, 512).memory_bytes <= (size + 0.5) * 100_001 + 16  # type: ignore[arg-type]


@pytest.mark.parametrize("seq_length", [3, 11, 512])
def test_rows_are_found_among_documents_of_most_unequal_lengths(seq_length: int) -> None:
    """Many short documents in a row, and long ones between: some fences are crowded, others stand alone."""
    generator = np.random.default_rng(4)
    lengths = generator.integers(0, 4, 30_000)
    lengths[generator.integers(0, lengths.size, 40)] = generator.integers(1, 3_000_000, 40)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    filled, capacity = lengths[lengths > 0], seq_length - 2
    firsts = offsets[:-1][lengths > 0]

    index = RowIndex("stream", offsets, seq_length)
    starts = np.concatenate(([0], np.cumsum(filled + 1)))
    rows = np.unique(np.concatenate((generator.integers(0, index.num_rows, 20_000), [0, index.num_rows - 1])))
    documents = np.searchsorted(starts, rows * capacity, side="right") - 1
    assert np.array_equal(index.first_tokens(rows), firsts[documents] + rows * capacity - starts[documents])

    index = RowIndex("document", offsets, seq_length)
    starts = np.concatenate(([0], np.cumsum(-(-filled // capacity))))
    rows = np.unique(np.concatenate((generator.integers(0, index.num_rows, 20_000), starts[:-1], starts[1:] - 1)))
    documents = np.searchsorted(starts, rows, side="right") - 1
    assert np.array_equal(index.first_tokens(rows), firsts[documents] + (rows - starts[documents]) * capacity)


@pytest.mark.parametrize(
    ("offsets", "seq_length", "named"),
    [
        ([0, 5, 4], 8, r"offset 2 \(4\) is smaller than the one before \(5\)"),
        ([-1, 5], 8, "offsets must lie in 0 to 2.62"),
        ([0, 2**62 + 1], 8, "offsets must lie in 0 to 2.62"),
        ([], 8, "at least one entry"),
        ([0, 5], 2, "seq_length must be 3 to 2.30, found 2"),
        ([0, 5], 2**30 + 1, "seq_length must be 3 to 2.30"),
        ([[0, 5]], 8, "expected one dimension"),
    ],
)
def test_bad_offsets_are_refused(offsets: list, seq_length: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        RowIndex("stream", np.array(offsets, np.int64), seq_length)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="expected stream or document, found pack"):
        RowIndex("pack", np.array([0, 5]), 8)  # type: ignore[arg-type]


def test_bad_requests_are_refused() -> None:
    index = RowIndex("stream", np.array([0, 20]), 6)
    tokens = np.arange(10, 30, dtype=np.uint16)
    for row in (-1, 5):
        with pytest.raises(IndexError, match=f"row {row} of 5"):
            fill(index, tokens, [0, row])
        with pytest.raises(IndexError, match=f"row {row} of 5"):
            index.first_tokens(np.array([row]))
    with pytest.raises(ValueError, match="the index needs 20 tokens, found 19"):
        fill(index, tokens[:19], [0])
    tokens[6] = 100
    with pytest.raises(IndexError, match="token 6 has id 100, outside the vocabulary of 100 pieces"):
        fill(index, tokens, [1])
    negative = np.full(20, -3, np.int32)
    with pytest.raises(IndexError, match="token 0 has id -3"):
        fill(index, negative, [0])


def test_arrays_are_never_cast_or_copied() -> None:
    index = RowIndex("stream", np.array([0, 20]), 6)
    tokens, rows, out = np.arange(20, dtype=np.uint16), np.array([0]), np.empty((1, 6), np.int64)
    good = {"tokens": tokens, "rows": rows, "out_ids": out, "out_segment": out.copy()}
    index.fill(ids=IDS, **good)
    for bad in (
        {"tokens": tokens.astype(np.float32)},
        {"tokens": tokens.astype(np.uint32)},
        {"tokens": np.arange(40, dtype=np.uint16)[::2]},
        {"rows": rows.astype(np.int32)},
        {"out_ids": out.astype(np.int32)},
        {"out_ids": np.asfortranarray(np.empty((3, 6), np.int64)), "rows": np.arange(3)},
    ):
        with pytest.raises(TypeError):
            index.fill(ids=IDS, **{**good, **bad})
    for shape in ((1, 5), (2, 6), (6,)):
        with pytest.raises(ValueError, match=r"out_segment: expected shape \[1, 6\]"):
            index.fill(ids=IDS, **{**good, "out_segment": np.empty(shape, np.int64)})
    out.flags.writeable = False
    with pytest.raises(ValueError, match="writ"):
        index.fill(ids=IDS, **good)


def test_a_missing_extension_names_interpreter_and_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    module.native.cache_clear()
    monkeypatch.setitem(sys.modules, "pretrain.data._native", None)
    try:
        with pytest.raises(MissingExtensionError) as error:
            RowIndex("stream", np.array([0, 20]), 6)
    finally:
        module.native.cache_clear()
    assert sys.executable in str(error.value)
    assert "python -m pip install -e . --no-build-isolation" in str(error.value)


def test_an_extension_of_other_sources_is_named_and_not_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = module.native()
    module.native.cache_clear()
    (tmp_path / "csrc" / "include" / "taco").mkdir(parents=True)
    (tmp_path / "csrc" / "order.cpp").write_text("// newer\n")
    monkeypatch.setattr(module, "_SOURCES", tmp_path / "csrc")  # there need be none beside the extension
    try:
        with pytest.raises(MissingExtensionError) as error:
            RowIndex("stream", np.array([0, 20]), 6)
    finally:
        module.native.cache_clear()
    assert f"was built from other sources ({built.sources}) than those in {tmp_path / 'csrc'}" in str(error.value)


def test_an_installed_extension_is_not_held_against_sources_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sources_digest(ROOT / "csrc") == module.native().sources
    module.native.cache_clear()
    (tmp_path / "csrc" / "include").mkdir(parents=True)
    (tmp_path / "csrc" / "kernels.cpp").write_text("// of another package\n")
    monkeypatch.setattr(module, "_SOURCES", tmp_path / "csrc")
    assert module.native().sources == sources_digest(ROOT / "csrc")
