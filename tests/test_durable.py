"""Files that survive: hashes, atomic replacement, nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import xxhash

from pretrain import durable


def test_hash_while_writing_equals_hash_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "state.bin"
    with durable.hashing_writer(path) as file:
        for block in (b"abc", b"", b"x" * 5_000_000):
            file.write(block)
    record = durable.record_of(path, tmp_path)
    assert (file.num_bytes, file.hexdigest()) == (record.num_bytes, record.xxh3_128)
    assert record.xxh3_128 == xxhash.xxh3_128_hexdigest(path.read_bytes())
    assert record.name == "state.bin"


def test_write_text_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    durable.write_text(path, "one")
    durable.write_text(path, "two")
    assert path.read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["latest"]


def test_failed_write_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "latest"
    durable.write_text(path, "good")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        durable.write_text(path, "never")
    assert path.read_text() == "good"
    assert [p.name for p in tmp_path.iterdir()] == ["latest"]
