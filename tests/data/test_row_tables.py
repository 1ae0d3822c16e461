"""The tables of row modes sentence and pack against plain Python: every token once, whatever the threads or damage."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_versions import packed_rows, sentence_rows

from pretrain.data.native import native
from pretrain.data.sample_index import PackIndex, RowIds, Rows, SentenceIndex, TokenRuns

IDS = RowIds(vocab_size=30_000, cls=2, sep=3, pad=0)
DTYPES = ["uint16", "int32", "int16", "int64"]


def number_tokens(lengths: list[list[int]]) -> list[list[list[int]]]:
    """Documents of sentences of these lengths, every token another id."""
    token, documents = 5, []
    for document in lengths:
        documents.append([])
        for length in document:
            documents[-1].append(list(range(token, token + length)))
            token += length
    return documents


def unaligned(values: list[int], dtype: str) -> np.ndarray:
    """As the arrays of a mapped .idx file lie."""
    buffer = np.zeros(len(values) * np.dtype(dtype).itemsize + 2, np.uint8)
    array = buffer[2:].view(dtype)
    array[:] = values
    return array


def sentence_table(lengths: list[list[int]], seq_length: int, **options) -> dict[str, np.ndarray]:
    flat = unaligned([length for document in lengths for length in document], "int32")
    return SentenceIndex.build(flat, unaligned([0, *accumulate(map(len, lengths))], "int64"), seq_length, **options)


def read(index: Rows, tokens: list[int], dtype: str = "int64") -> tuple[list[list[int]], list[list[int]]]:
    rows = np.arange(index.num_rows)
    ids, segment = (np.full((len(rows), index.seq_length), -1, np.int64) for _ in range(2))
    index.fill(np.array(tokens, dtype), rows, IDS, out_ids=ids, out_segment=segment)
    return ids.tolist(), segment.tolist()


def framed(rows: list[list[list[int]]], seq_length: int) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of pieces -> token ids and segments."""
    ids, segments = [], []
    for row in rows:
        line = [token for piece in row for token in [2, *piece, 3]]
        numbers = [number for number, piece in enumerate(row, 1) for _ in range(len(piece) + 2)]
        ids.append(line + [0] * (seq_length - len(line)))
        segments.append(numbers + [0] * (seq_length - len(line)))
    return ids, segments


corpora = st.lists(st.lists(st.one_of(st.integers(0, 12), st.integers(0, 70)), max_size=9), max_size=9)


@settings(deadline=None, derandomize=True, max_examples=500)
@given(lengths=corpora, seq_length=st.integers(3, 40), dtype=st.sampled_from(DTYPES))
def test_sentence_rows_equal_the_plain_version(lengths: list, seq_length: int, dtype: str) -> None:
    documents = number_tokens(lengths)
    index = SentenceIndex(sentence_table(lengths, seq_length), seq_length)
    expected = [[row] for row in sentence_rows(documents, seq_length)]
    tokens = [token for document in documents for sentence in document for token in sentence]
    assert read(index, tokens, dtype) == framed(expected, seq_length)
    assert [token for row in expected for piece in row for token in piece] == tokens
    assert index.num_tokens == len(tokens)
    assert index.num_filled == len(tokens) + 2 * len(expected)
    starts = [row[0][0] - 5 for row in expected]
    assert index.first_tokens(np.arange(index.num_rows)).tolist() == starts


@pytest.mark.parametrize("mean", [4, 26, 300])
@pytest.mark.parametrize("has_long", [False, True])
def test_long_sentence_tables_equal_the_plain_version_for_any_threads(mean: int, has_long: bool) -> None:
    """More sequences than a task and a block hold, in documents of all sizes, empty ones among them."""
    generator = np.random.default_rng(mean)
    lengths = generator.poisson(mean, 600_000).astype(np.int32)
    lengths[generator.random(len(lengths)) < 0.01] = 0
    if has_long:
        lengths[generator.integers(0, len(lengths), 300)] = generator.integers(500, 3000, 300)
    borders = np.unique(generator.integers(0, len(lengths), 20_000))
    borders = borders[(borders < 100_000) | (borders > 400_000)]  # one document of more than a task
    firsts = np.sort(np.concatenate(([0, 0], borders, borders[::50], [len(lengths)]))).astype(np.int64)
    tables = [SentenceIndex.build(lengths, firsts, 512, num_threads=threads) for threads in (1, 2, 7)]
    for table in tables[1:]:
        assert all(np.array_equal(table[name], tables[0][name]) for name in table)
    expected = plain_starts(lengths.tolist(), firsts.tolist(), 510)
    assert SentenceIndex(tables[0], 512).first_tokens(np.arange(len(expected))).tolist() == expected
    assert len(tables[0]["starts"]) == len(expected)


def plain_starts(lengths: list[int], firsts: list[int], capacity: int) -> list[int]:
    """First tokens of the rows, by lengths alone."""
    starts, place = [], 0
    for first, end in zip(firsts, firsts[1:], strict=False):
        used = 0
        for length in lengths[first:end]:
            if used and used + length > capacity:
                starts.append(place - used)
                used = 0
            if length > capacity:
                starts += range(place, place + length, capacity)
            else:
                used += length
            place += length
        if used:
            starts.append(place - used)
    return starts


def test_a_sentence_table_takes_four_bytes_per_row_and_can_be_built_in_parts() -> None:
    generator = np.random.default_rng(3)
    parts = [generator.integers(1, 60, (100, 50)) for _ in range(4)]
    builder = native().SentenceTableBuilder(64)
    for part in parts:
        firsts = np.arange(0, 5001, 50, dtype=np.int64)
        builder.add(part.astype(np.int32).ravel(), firsts, np.empty(0, np.bool_), 2)
    bases, starts = builder.finish()
    whole = sentence_table([row for part in parts for row in part.tolist()], 64)
    assert np.array_equal(bases, whole["bases"])
    assert np.array_equal(starts, whole["starts"])
    index = SentenceIndex(whole, 64)
    assert index.memory_bytes <= 4.04 * index.num_rows + 16


def test_sentence_places_beyond_32_bits_are_right() -> None:
    lengths = np.full(3, 2**31 - 1, np.int32)
    table = SentenceIndex.build(lengths, np.array([0, 3]), 2**24, num_threads=2)
    index = SentenceIndex(table, 2**24)
    capacity, per_sentence = 2**24 - 2, -(-(2**31 - 1) // (2**24 - 2))
    assert index.num_rows == 3 * per_sentence
    rows = np.array([per_sentence - 1, per_sentence, 2 * per_sentence, 3 * per_sentence - 1])
    expected = [(per_sentence - 1) * capacity, 2**31 - 1, 2**32 - 2, 2**32 - 2 + (per_sentence - 1) * capacity]
    assert index.first_tokens(rows).tolist() == expected


@pytest.mark.slow
def test_a_hundred_million_sentence_rows_take_four_bytes_each() -> None:
    """Built in ten parts; every row is one full sentence, so all starts are known."""
    builder = native().SentenceTableBuilder(512)
    lengths, firsts = np.full(10**7, 510, np.int32), np.arange(0, 10**7 + 1, 100, dtype=np.int64)
    for _ in range(10):
        builder.add(lengths, firsts, np.empty(0, np.bool_), 2)
    num_tokens = np.array([builder.num_tokens])
    bases, starts = builder.finish()
    index = SentenceIndex({"bases": bases, "starts": starts, "num_tokens": num_tokens}, 512)
    assert index.num_rows == 10**8
    assert index.memory_bytes < 4.04 * 10**8
    rows = np.random.default_rng(0).integers(0, 10**8, 10**6)
    assert np.array_equal(index.first_tokens(rows), rows * 510)
    assert (rows * 510).max() > 2**35


@pytest.mark.parametrize(
    ("lengths", "firsts", "named"),
    [
        ([5, -1, 5], [0, 3], "sequence 1 has the length -1"),
        ([5, 5], [0, 3], r"document 0 has the sequences 0 to 3 of 2"),
        ([5, 5], [0, 2, 1], r"document 1 has the sequences 2 to 1 of 2"),
        ([5, 5], [-1, 2], r"document 0 has the sequences -1 to 2"),
        ([5, 5], [0, 0, 2**62], r"document 1 has the sequences 0 to"),
        ([5, 5], [2, 0, 2], r"document 0 has the sequences 2 to 0"),
    ],
)
def test_bad_sequences_are_refused(lengths: list, firsts: list, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SentenceIndex.build(np.array(lengths, np.int32), np.array(firsts, np.int64), 8)


# -- pack --------------------------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=500)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 12), st.integers(0, 90)), max_size=40),
    seq_length=st.integers(3, 70),
    dtype=st.sampled_from(DTYPES),
)
def test_packed_rows_equal_the_plain_version(lengths: list, seq_length: int, dtype: str) -> None:
    documents = [document[0] for document in number_tokens([[length] for length in lengths])]
    tokens = [token for document in documents for token in document]
    index = PackIndex(PackIndex.build(np.array([0, *accumulate(lengths)]), seq_length), seq_length)
    expected = packed_rows(documents, seq_length)
    assert read(index, tokens, dtype) == framed(expected, seq_length)
    assert sorted(token for row in expected for piece in row for token in piece) == tokens
    assert index.num_filled == sum(len(piece) + 2 for row in expected for piece in row)
    assert index.num_tokens == len(tokens)
    assert index.first_tokens(np.arange(index.num_rows)).tolist() == [row[0][0] - 5 for row in expected]


def test_packing_over_several_windows_is_the_same_for_any_threads_and_loses_nothing() -> None:
    generator = np.random.default_rng(5)
    lengths = np.minimum(generator.lognormal(5.0, 1.2, 700_000).astype(np.int64), 20_000)
    lengths[100] = 2**18 * 510 + 77  # pieces of more than a window
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    tables = [PackIndex.build(offsets, 512, num_threads=threads) for threads in (1, 2, 7)]
    for table in tables[1:]:
        assert all(np.array_equal(table[name], tables[0][name]) for name in table)
    table = tables[0]
    assert len(table["windows"]) > 4
    pieces = np.diff(table["windows"][:, 1])
    places = np.repeat(table["windows"][:-1, 2], pieces) + table["piece_starts"]
    order = np.argsort(places)
    ends = places[order] + table["piece_lengths"][order]
    assert places[order][0] == 0
    assert np.array_equal(places[order][1:], ends[:-1])
    assert ends[-1] == offsets[-1]
    index = PackIndex(table, 512)
    assert index.num_filled / (512 * index.num_rows) > 0.99
    tokens = np.full(int(offsets[-1]), 9, np.uint16)
    rows = generator.integers(0, index.num_rows, 2000)
    ids, segment = (np.empty((2000, 512), np.int64) for _ in range(2))
    index.fill(tokens, rows, IDS, out_ids=ids, out_segment=segment)
    assert ((ids == 2).sum(axis=1) == segment.max(axis=1)).all()


def test_pack_positions_beyond_32_bits_are_right() -> None:
    offsets = np.array([0, 2**33, 2**33 + 7])
    index = PackIndex(PackIndex.build(offsets, 65536, num_threads=2), 65536)
    full = -(-(2**33) // 65534)
    assert index.num_rows == full  # the short document stands behind the long one's rest
    found = np.sort(index.first_tokens(np.arange(full)))
    assert np.array_equal(found, np.arange(full, dtype=np.int64) * 65534)


@pytest.mark.parametrize(
    ("offsets", "seq_length", "named"),
    [
        ([0, 5, 4], 8, r"offset 2 \(4\) is smaller than the one before \(5\)"),
        ([-1, 5], 8, "offsets must lie in 0 to 2.62"),
        ([], 8, "at least one entry"),
        ([0, 5], 2, "seq_length must be 3 to 65536, found 2"),
        ([0, 5], 65537, "seq_length must be 3 to 65536"),
    ],
)
def test_bad_offsets_are_refused(offsets: list, seq_length: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        PackIndex.build(np.array(offsets, np.int64), seq_length)


# -- tables that are not what was built --------------------------------------------------------------------------------


def test_rows_outside_and_short_token_arrays_are_refused() -> None:
    lengths = [[4, 4], [3]]
    tokens = list(range(5, 16))
    for index in (
        SentenceIndex(sentence_table(lengths, 8), 8),
        PackIndex(PackIndex.build(np.array([0, 8, 11]), 8), 8),
    ):
        out = np.empty((1, 8), np.int64)
        for row in (-1, index.num_rows):
            with pytest.raises(IndexError, match=f"row {row} of {index.num_rows}"):
                index.first_tokens(np.array([row]))
            with pytest.raises(IndexError, match=f"row {row} of {index.num_rows}"):
                index.fill(np.array(tokens), np.array([row]), IDS, out_ids=out, out_segment=out.copy())
        with pytest.raises(ValueError, match="the index needs 11 tokens, found 10"):
            read(index, tokens[:10])


@settings(deadline=None, derandomize=True, max_examples=300)
@given(data=st.data(), kind=st.sampled_from(["sentence", "pack"]))
def test_a_damaged_table_raises_and_reads_nothing_outside(data: st.DataObject, kind: str) -> None:
    """Whatever stands in the arrays: typed errors, or rows of tokens of this dataset and of no byte beside them.

    The tokens lie between others that a read outside would return, and the rows between places that must stay as they
    are; sanitizers watch this test, too.
    """
    lengths = [[4, 9, 2], [30], [3, 3, 3]]
    if kind == "sentence":
        table = sentence_table(lengths, 16)
    else:
        table = PackIndex.build(np.array([0, *accumulate(map(sum, lengths))]), 16)
    name = data.draw(st.sampled_from(sorted(table)))
    array = table[name] = table[name].copy()
    limits = np.iinfo(array.dtype)
    array.flat[data.draw(st.integers(0, array.size - 1))] = data.draw(
        st.one_of(st.integers(max(-4, limits.min), 70), st.integers(limits.min, limits.max))
    )
    beside, num_tokens = 77, sum(map(sum, lengths))
    memory = np.full(num_tokens + 400, beside)
    memory[200:-200] = np.arange(5, 5 + num_tokens)
    try:
        index = SentenceIndex(table, 16) if kind == "sentence" else PackIndex(table, 16)
        rows = np.arange(index.num_rows)
        ids = np.full((len(rows) + 2, 16), -1, np.int64)
        index.fill(memory[200:-200], rows, IDS, out_ids=ids[1:-1], out_segment=np.empty_like(ids[1:-1]))
    except (ValueError, IndexError):
        return
    assert set(ids[1:-1].flat) <= {IDS.pad, IDS.cls, IDS.sep, *range(5, 5 + num_tokens)}
    assert (ids[[0, -1]] == -1).all()


def test_arrays_of_other_shapes_are_refused() -> None:
    table = sentence_table([[4] * 5], 6)
    with pytest.raises(ValueError, match="2 blocks for 5 rows"):
        SentenceIndex({**table, "bases": np.zeros(2, np.int64)}, 6)
    packed = PackIndex.build(np.array([0, 5]), 8)
    with pytest.raises(ValueError, match="expected shape"):
        PackIndex({**packed, "windows": packed["windows"][:, :2].copy()}, 8)
    with pytest.raises(ValueError, match="do not fit"):
        PackIndex({**packed, "row_pieces": np.zeros(2, np.uint32)}, 8)


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("places", "tokens"), [([1], [0]), ([0, 5, 5], [0, 9, 12]), ([0, 5], [0, 4]), ([0], [-1]), ([0, 5], [9, 3])]
)
def test_runs_that_do_not_rise_are_refused(places: list[int], tokens: list[int]) -> None:
    runs = TokenRuns(np.array(places), np.array(tokens))
    with pytest.raises(ValueError, match="the runs do not rise"):
        read(SentenceIndex(sentence_table([[4, 4]], 8), 8, runs), list(range(5, 30)))
