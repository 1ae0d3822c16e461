"""Datasets of other programs are named, never called damaged; names of datasets, and those that are missing."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from dataset_builders import write_dataset

from pretrain.config.sections import DataSection
from pretrain.data.dataset.dataset_format import MAGIC
from pretrain.data.dataset.indexed_dataset import IndexedDataset
from pretrain.data.dataset.verification import verify
from pretrain.errors import DataError

LENGTHS = struct.pack("<3i", 2, 1, 3)
POINTERS = struct.pack("<3q", 0, 4, 6)
DOCUMENTS = struct.pack("<3q", 0, 1, 3)
REST = LENGTHS + POINTERS + DOCUMENTS


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (MAGIC + struct.pack("<QBQQ", 1, 8, 3, 3) + REST + bytes(3), r"is an index with modes \(multimodal=True\)"),
        (b"TNTIDX\0\0" + struct.pack("<QQQQ", 1, 8, 2, 3) + bytes(99), "TNTIDX, --dataset-impl cached or lazy"),
        (MAGIC + struct.pack("<QBQ", 1, 8, 3) + LENGTHS + POINTERS, "fairseq"),
        (MAGIC + struct.pack("<QBQQ", 1, 6, 3, 3) + REST, "dtype code: expected an integer type.* found 6.* float64"),
        (MAGIC + struct.pack("<QBQQ", 1, 9, 3, 3) + REST, "dtype code: .* found 9, which is uint32"),
        (MAGIC + struct.pack("<QBQQ", 2, 8, 3, 3) + REST, "version: expected 1, found 2"),
        (MAGIC + struct.pack(">QBQQ", 1, 8, 3, 3) + REST, "big-endian"),
        (b"\x1f\x8b\x08" + bytes(40), "compressed by gzip"),
    ],
    ids=["multimodal", "cached", "fairseq", "float64", "uint32", "version", "big-endian", "gzip"],
)
def test_sound_indexes_of_another_kind_are_said(tmp_path: Path, index: bytes, words: str) -> None:
    (tmp_path / "a.idx").write_bytes(index)
    (tmp_path / "a.bin").write_bytes(bytes(12))
    with pytest.raises(DataError, match=rf"a\.idx: .*{words}") as caught:
        IndexedDataset(tmp_path / "a")
    assert "copy" not in str(caught.value)
    assert verify(tmp_path / "a") == [str(caught.value)]


def test_any_file_of_a_dataset_is_its_name(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", [[[5]]])
    for name in ("a", "a.bin", "a.idx", "a.json"):
        assert IndexedDataset(tmp_path / name).prefix == str(tmp_path / "a")
        assert DataSection(train=(str(tmp_path / name),)).train == (str(tmp_path / "a"),)
    write_dataset(tmp_path / "b.bin", [[[5]]])
    assert IndexedDataset(tmp_path / "b.bin").prefix == str(tmp_path / "b.bin")


def test_what_is_missing_is_said_with_a_remedy(tmp_path: Path) -> None:
    for name in ("a", "a.bin", "a.idx"):
        with pytest.raises(DataError, match=r"/a\.bin: No such file or directory; .*`taco data preprocess` makes one"):
            IndexedDataset(tmp_path / name)
    write_dataset(tmp_path / "a", [[[5]]])
    os.remove(tmp_path / "a.bin")
    with pytest.raises(DataError, match=r"a\.bin: No such file or directory; it belongs beside .*a\.idx"):
        IndexedDataset(tmp_path / "a")
    with pytest.raises(DataError, match="is a folder; give the prefix of a dataset in it"):
        IndexedDataset(tmp_path)
    with pytest.raises(DataError, match="cannot be read: File name too long$"):
        IndexedDataset(tmp_path / ("a" * 300))


def test_a_file_that_may_not_be_read_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path / "a", [[[5]]])

    def refuse(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"a\.bin: cannot be read: Permission denied$"):
        IndexedDataset(tmp_path / "a")
