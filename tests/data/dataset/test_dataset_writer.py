"""A writer cut off anywhere goes on from its last state, and gives the same files as one that was not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dataset_builders import tokenizer_info
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain.data.dataset.dataset_writer import IndexedDatasetWriter, WriterState, can_resume
from pretrain.data.dataset.indexed_dataset import IndexedDataset
from pretrain.data.dataset.verification import verify
from pretrain.errors import DataError

IN_TMP = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
sequences = st.lists(st.integers(0, 99), max_size=6)
batches = st.lists(st.lists(st.lists(sequences, max_size=3), max_size=4), min_size=1, max_size=5)


def add(writer: IndexedDatasetWriter, documents: list[list[list[int]]]) -> None:
    flat = [sequence for document in documents for sequence in document]
    tokens = np.array([token for sequence in flat for token in sequence], np.uint16)
    lengths, counts = (np.array([len(item) for item in items], np.int64) for items in (flat, documents))
    writer.add_documents(tokens, lengths, counts)


def content(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx", ".json")]


@pytest.mark.slow
@IN_TMP
@given(batches=batches, chunk=st.sampled_from([8, 16, 24, 1 << 20]))
def test_many_documents_at_once_and_resumed_equal_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: list, chunk: int
) -> None:
    monkeypatch.setattr("pretrain.data.dataset.dataset_writer.CHUNK_BYTES", chunk)
    with IndexedDatasetWriter(tmp_path / "one", "uint16", overwrite=True) as writer:
        for document in [document for batch in batches for document in batch]:
            writer.add_document([np.array(sequence, np.int64) for sequence in document])
        writer.finalize(tokenizer=tokenizer_info())
    state: WriterState | None = None
    for batch in batches:
        with IndexedDatasetWriter(tmp_path / "many", "uint16", overwrite=True, state=state) as writer:
            add(writer, batch)
            state = writer.checkpoint()
            add(writer, [[[1, 2, 3]]])  # what the next one must cut off
            writer.keep()
    with IndexedDatasetWriter(tmp_path / "many", "uint16", overwrite=True, state=state) as writer:
        writer.finalize(tokenizer=tokenizer_info())
    assert content(tmp_path / "many") == content(tmp_path / "one")
    assert verify(tmp_path / "many") == []
    assert not list(tmp_path.glob("*.tmp"))


def test_files_that_are_shorter_or_changed_do_not_resume(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "a", "uint16") as writer:
        add(writer, [[[1, 2], [3]], [[4]]])
        state = writer.checkpoint()
        writer.keep()
    assert can_resume(tmp_path / "a", "uint16", state)
    for name in ("bin", "lengths", "documents"):
        path = tmp_path / f"a.{name}.tmp"
        good = path.read_bytes()
        path.write_bytes(good[:-1])
        assert not can_resume(tmp_path / "a", "uint16", state)
        path.write_bytes(good)
    path = tmp_path / "a.bin.tmp"
    path.write_bytes(b"\x07" + path.read_bytes()[1:])
    assert not can_resume(tmp_path / "a", "uint16", state)
    with (
        pytest.raises(DataError, match="is not what was written"),
        IndexedDatasetWriter(tmp_path / "a", "uint16", state=state),
    ):
        pass
    assert path.exists()


def test_lengths_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    tokens, two = np.arange(4, dtype=np.uint16), np.array([2, 2])
    with IndexedDatasetWriter(tmp_path / "a", "uint16") as writer:
        for lengths, counts in (([2, 1], None), ([5, -1], None), (two, [1]), (two, [3, -1]), ([2**31, 0], None)):
            with pytest.raises(DataError, match="document 0"):
                writer.add_documents(tokens, np.array(lengths), None if counts is None else np.array(counts))
        writer.add_documents(tokens, two, np.array([0, 2, 0]))
        writer.finalize(tokenizer=tokenizer_info())
    dataset = IndexedDataset(tmp_path / "a")
    assert [dataset.document(i).tolist() for i in range(3)] == [[], [0, 1, 2, 3], []]
