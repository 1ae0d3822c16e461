"""Preprocessing on disks that are full or read-only: an error in one line, the old dataset kept, the work continued."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from data_programs import dataset_bytes, looks_finished, preprocess, write_lines

from pretrain.data.dataset.verification import verify

TEXTS = ["the cat sat on the mat " * 5000] * 60  # 1.2 MB of token ids


@pytest.mark.fault("preprocess")
@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_full_disk_loses_nothing_and_room_lets_it_go_on(
    tmp_path: Path, disk: Callable[[str], Path], workers: int
) -> None:
    words = ["--input", write_lines(tmp_path / "x.jsonl", TEXTS), "--workers", workers, "--journal-seconds", 0]
    preprocess(tmp_path, *words).check()
    folder = disk("size=700k")
    preprocess(tmp_path, *words, output="disk/out").check_error("cannot be written", "No space left")
    assert looks_finished(folder) == []
    disk("size=8m")
    preprocess(tmp_path, *words, output="disk/out").check()
    assert dataset_bytes(folder) == dataset_bytes(tmp_path)
    assert verify(folder / "out") == []


@pytest.mark.fault("preprocess")
@pytest.mark.slow
def test_a_disk_that_fills_up_while_overwriting_keeps_the_old_dataset(
    tmp_path: Path, disk: Callable[[str], Path]
) -> None:
    folder = disk("size=700k")
    old = write_lines(tmp_path / "old.jsonl", ["the good cat"])
    preprocess(tmp_path, "--input", old, output="disk/out").check()
    before = dataset_bytes(folder)
    words = ["--input", write_lines(tmp_path / "x.jsonl", TEXTS), "--overwrite"]
    preprocess(tmp_path, *words, output="disk/out").check_error("No space left")
    assert dataset_bytes(folder) == before
    assert verify(folder / "out") == []


@pytest.mark.fault("preprocess")
@pytest.mark.slow
def test_a_read_only_disk_is_named(tmp_path: Path, disk: Callable[[str], Path]) -> None:
    disk("size=1m")
    disk("ro")
    write_lines(tmp_path / "x.jsonl", ["the cat"])
    for output in ("disk/out", "disk/new/out"):
        preprocess(tmp_path, "--input", "x.jsonl", output=output).check_error("disk", "Read-only file system")
