"""A start looks at the content of its data: some chunks against the hashes of the manifest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from reading_rights import unreadable
from small_runs import write_cyclic_dataset

from pretrain.data.dataset import dataset_writer
from pretrain.data.dataset.indexed_dataset import IndexedDataset
from pretrain.data.dataset.spot_check import find_damage_on_nodes, find_difference
from pretrain.data.tokenizer.load import load_tokenizer
from pretrain.errors import DataError

CHUNK = 512


@pytest.fixture
def prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset of several small chunks."""
    monkeypatch.setattr(dataset_writer, "CHUNK_BYTES", CHUNK)
    write_cyclic_dataset(tmp_path / "train")
    return tmp_path / "train"


def overwrite(path: Path, first: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(first)
        file.write(content)


def test_first_last_and_one_drawn_chunk_are_looked_at(prefix: Path) -> None:
    dataset = IndexedDataset(prefix)
    assert dataset.manifest is not None
    num_chunks = len(dataset.manifest.bin_xxh64)
    assert num_chunks > 5
    assert find_difference(dataset) is None
    for number in (0, 3, num_chunks - 1):
        original = dataset.bin_path.read_bytes()
        overwrite(dataset.bin_path, number * CHUNK, b"\7")
        end = min((number + 1) * CHUNK, len(original))
        message = find_difference(dataset, lambda count: 3)
        assert message is not None
        assert message.startswith(f"{prefix}.bin: chunk {number}, bytes {number * CHUNK} to {end}: differ from what")
        assert f"`taco data verify {prefix}`" in message
        dataset.bin_path.write_bytes(original)


@pytest.mark.fault("data-size")
def test_half_a_file_of_zeros_and_another_index_are_found(prefix: Path) -> None:
    pytest.importorskip("torch", reason="ranks share what one of them found")
    dataset = IndexedDataset(prefix)
    assert find_damage_on_nodes([dataset, dataset]) is None
    size = dataset.bin_path.stat().st_size
    original = dataset.bin_path.read_bytes()
    overwrite(dataset.bin_path, size // 2, bytes(size - size // 2))
    message = find_damage_on_nodes([dataset])
    assert message is not None
    assert "train.bin: chunk" in message
    dataset.bin_path.write_bytes(original)
    lengths = np.array(dataset.sequence_lengths)
    overwrite(dataset.idx_path, 34, lengths[::-1].tobytes())
    message = find_damage_on_nodes([dataset])
    assert message is not None
    assert "train.idx: bytes 0 to" in message


def test_what_may_not_be_read_is_named_and_not_called_different(prefix: Path) -> None:
    dataset = IndexedDataset(prefix)
    with unreadable(dataset.bin_path):
        message = find_difference(dataset)
    assert message is not None
    assert message.endswith("cannot be read: Permission denied")


def test_a_dataset_without_a_manifest_cannot_be_checked(prefix: Path) -> None:
    Path(f"{prefix}.json").unlink()
    assert find_difference(IndexedDataset(prefix)) is None


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
def test_a_dataset_that_may_not_be_read_is_an_error_of_one_line(prefix: Path, suffix: str) -> None:
    path = Path(f"{prefix}{suffix}")
    with unreadable(path), pytest.raises(DataError, match=f"^{path}: cannot be read: Permission denied$"):
        IndexedDataset(prefix)


def test_a_tokenizer_that_may_not_be_read_is_not_called_damaged(prefix: Path) -> None:
    folder = Path(f"{prefix}.tokenizer")
    for path in (folder, folder / "taco_tokenizer.json"):
        with unreadable(path), pytest.raises(DataError, match="cannot be read: Permission denied"):
            load_tokenizer(folder)
