"""The mapped arrays of a dataset are the bytes of its files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from dataset_builders import write_dataset

from pretrain.data.dataset.dataset_format import map_array, map_index, prefix_of


def test_the_arrays_of_an_index_are_its_bytes(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path / "a", [[[5, 6, 7], [8]], [], [[9, 10]]])
    lengths, pointers, documents = map_index(tmp_path / "a.idx", manifest.sequences, manifest.documents + 1)
    assert (lengths.dtype.str, pointers.dtype.str, documents.dtype.str) == ("<i4", "<i8", "<i8")
    assert lengths.tolist() == [3, 1, 2]
    assert pointers.tolist() == [0, 6, 8]
    assert documents.tolist() == [0, 2, 2, 3]
    assert (
        b"".join(array.tobytes() for array in (lengths, pointers, documents))
        == ((tmp_path / "a.idx").read_bytes()[34:])
    )
    assert map_array(tmp_path / "a.bin", "<u2", 2, 4).tolist() == [6, 7, 8, 9]


def test_empty_arrays_need_no_file_of_some_size(tmp_path: Path) -> None:
    (tmp_path / "a.idx").write_bytes(b"")
    array = map_array(tmp_path / "a.idx", np.dtype("<i8"), 34, 0)
    assert (array.size, array.dtype.str) == (0, "<i8")


def test_a_file_of_a_dataset_stands_for_its_prefix(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a.json", [[[5]]])
    names = [str(tmp_path / f"a.json{suffix}") for suffix in (".bin", ".idx", ".json", "", ".txt")]
    prefix = str(tmp_path / "a.json")
    assert [prefix_of(name) for name in names] == [prefix, prefix, prefix, prefix, f"{prefix}.txt"]
