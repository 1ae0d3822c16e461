"""Duplicates are exactly the documents that a Python set has seen before, whatever the memory and threads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.output.duplicates import RawDocuments, copy_unique
from pretrain.data.dataset.dataset_writer import IndexedDatasetWriter
from pretrain.data.dataset.manifest import Dropped
from pretrain.data.native import native
from pretrain.errors import DataError

documents = st.lists(st.lists(st.lists(st.integers(0, 2), max_size=3), max_size=3), max_size=30)


def plain_unique(found: list[list[list[int]]]) -> list[list[list[int]]]:
    seen: set[tuple[int, ...]] = set()
    kept = []
    for document in found:
        ids = tuple(token for sequence in document for token in sequence)
        if ids not in seen:
            kept.append(document)
        seen.add(ids)
    return kept


def write_raw(folder: Path, found: list[list[list[int]]], dtype: str) -> RawDocuments:
    with IndexedDatasetWriter(folder / "raw", dtype, overwrite=True) as writer:
        for document in found:
            writer.add_document([np.array(sequence, np.int64) for sequence in document])
        writer.checkpoint()
        writer.keep()
    return RawDocuments.open(str(folder / "raw"), np.dtype(dtype))


def read_back(raw: RawDocuments) -> list[list[list[int]]]:
    ends = np.cumsum(raw.lengths, dtype=np.int64)
    sequences = [raw.tokens[end - length : end].tolist() for end, length in zip(ends, raw.lengths, strict=True)]
    return [sequences[a:b] for a, b in zip(raw.documents[:-1], raw.documents[1:], strict=True)]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    found=documents,
    dtype=st.sampled_from(["<u2", "<i4"]),
    memory=st.sampled_from([24, 100, 1 << 20]),
    threads=st.integers(1, 3),
    max_bytes=st.sampled_from([1, 7, 1 << 20]),
)
def test_copies_equal_a_plain_set(
    tmp_path: Path, found: list, dtype: str, memory: int, threads: int, max_bytes: int
) -> None:
    raw = write_raw(tmp_path, found, dtype)
    with IndexedDatasetWriter(tmp_path / "out", dtype, overwrite=True) as writer:
        dropped = copy_unique(raw, writer, memory=memory, threads=threads, max_bytes=max_bytes)
        writer.checkpoint()
        kept = read_back(RawDocuments.open(str(tmp_path / "out"), np.dtype(dtype)))
    expected = plain_unique(found)
    assert kept == expected
    tokens = sum(len(s) for d in found for s in d) - sum(len(s) for d in expected for s in d)
    assert dropped == Dropped(len(found) - len(expected), tokens, 0)
    assert sorted(path.name for path in tmp_path.glob("out*")) == []


def test_equal_hashes_of_different_documents_are_told_apart() -> None:
    data = np.frombuffer(b"abcabdababcabd", np.uint8).copy()
    offsets = np.array([0, 3, 6, 8, 11, 14, 14, 14], np.int64)
    hashes, marks = np.zeros((7, 2), np.uint64), np.zeros(7, np.uint8)  # as if all hashes were equal
    native().mark_duplicates(data, offsets, hashes, 0, 1, 2, marks)
    assert marks.tolist() == [0, 0, 0, 1, 1, 0, 1]


def test_hashes_differ_and_do_not_depend_on_threads_or_place() -> None:
    maker = np.random.default_rng(0)
    data = maker.integers(0, 256, 60_000, np.uint8)
    sizes = maker.integers(0, 70, 1500)
    offsets = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    found = []
    for threads in (1, 3):
        hashes = np.zeros((1500, 2), np.uint64)
        native().hash_documents(data, offsets, threads, hashes)
        found.append(hashes)
    assert (found[0] == found[1]).all()
    texts = [data[a:b].tobytes() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    assert [native().hash_document(text) for text in texts] == [tuple(row) for row in found[0].tolist()]
    assert len({tuple(row) for row in found[0].tolist()}) == len(set(texts))
    # Neighbours in content: one flipped bit, zeros at the end, an exchanged half.
    near = [bytes(size) for size in range(200)]
    base = maker.bytes(64)
    near += [
        bytes(b ^ (1 << bit if i == byte else 0) for i, b in enumerate(base)) for byte in range(64) for bit in range(8)
    ]
    near += [base[i:] + base[:i] for i in range(1, 64)]
    for half in range(2):
        assert len({native().hash_document(text)[half] for text in near}) == len(set(near))


@pytest.mark.parametrize(
    ("offsets", "part", "parts", "threads", "match"),
    [
        ([0, 5], 0, 1, 1, "offset 1: expected 0 to 4, found 5"),
        ([0, 3, 2], 0, 1, 1, "offset 2: expected 3 to 4, found 2"),
        ([-1, 3], 0, 1, 1, "offset 0"),
        ([0, 4], 1, 1, 1, "part 1 of 1"),
        ([0, 4], 0, 0, 1, "part 0 of 0"),
        ([0, 4], 0, 1 << 21, 1, "part 0 of"),
        ([0, 4], 0, 1, 0, "num_threads"),
        ([0, 4], 0, 1, 5000, "num_threads"),
    ],
)
def test_arguments_that_cannot_be_are_refused(
    offsets: list[int], part: int, parts: int, threads: int, match: str
) -> None:
    data, count = np.zeros(4, np.uint8), len(offsets) - 1
    arguments = (data, np.array(offsets, np.int64), np.zeros((count, 2), np.uint64), part, parts, threads)
    with pytest.raises(ValueError, match=match):
        native().mark_duplicates(*arguments, np.zeros(count, np.uint8))
    with pytest.raises(ValueError, match="expected shape"):
        native().mark_duplicates(*arguments, np.zeros(count + 1, np.uint8))


def test_memory_that_cannot_do_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_tools.output.duplicates._MAX_PARTS", 2)
    raw = write_raw(tmp_path, [[[1]], [[2]], [[1]]], "<u2")
    with IndexedDatasetWriter(tmp_path / "out", "<u2") as writer, pytest.raises(DataError, match="too little for 3"):
        copy_unique(raw, writer, memory=24)
