"""Files that survive: hashes, atomic replacement, nothing left behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import xxhash
from project import ROOT
from reading_rights import unreadable

from pretrain import durable
from pretrain.durable import HashingFile

FIXTURES = ROOT / "tests" / "fixtures"
SEALED_BY_0_1_0 = {
    "text": FIXTURES / "dataset-0.1.0" / "part-0.json",
    "content": FIXTURES / "run-0.1.0" / "run" / "checkpoints" / "step-0000002" / "manifest.json",
}


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


@pytest.mark.parametrize("cut", [0, 1, 63, 64, 65, 200, 256, 300])
def test_chunks_are_hashed_and_a_file_is_taken_up_again(tmp_path: Path, cut: int) -> None:
    path, content = tmp_path / "a.bin", bytes(range(256)) + bytes(44)
    first = HashingFile(path, xxhash.xxh64, 64)
    for start in range(0, cut, 7):
        first.write(content[start : min(start + 7, cut)])
    first.close()
    digests = first.digests()
    assert digests == [xxhash.xxh64_hexdigest(content[start:cut][:64]) for start in range(0, cut, 64)]
    path.write_bytes(path.read_bytes() + b"what nobody vouches for")
    second = HashingFile(path, xxhash.xxh64, 64, num_bytes=cut, digests=digests)
    second.write(memoryview(content)[cut:])
    second.sync()
    assert (path.read_bytes(), second.num_bytes) == (content, 300)
    assert second.digests() == [xxhash.xxh64_hexdigest(content[start : start + 64]) for start in range(0, 300, 64)]
    second.close()
    assert durable.hash_range(path, 64, 128) == second.digests()[1]
    assert durable.hash_range(path, 256, 10_000) == second.digests()[4]


@pytest.mark.parametrize("over", ["text", "content"])
def test_manifests_of_release_0_1_0_are_sealed_as_they_would_be_now(over: durable.SealedPart) -> None:
    text = SEALED_BY_0_1_0[over].read_bytes()
    assert durable.is_sealed(text, over)
    tree = json.loads(text)
    del tree[durable.SELF_HASH]
    assert durable.seal_json(tree, over).encode() == text


@pytest.mark.parametrize("over", ["text", "content"])
def test_a_sealed_text_may_not_differ_in_what_is_sealed(over: durable.SealedPart) -> None:
    text = durable.seal_json({"name": "\u00e9\udc80", "number": 1.5, "list": [1, {"a": None}]}, over).encode()
    assert durable.is_sealed(text, over)
    for bit in range(8 * len(text)):
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            is_other = over == "text" or json.loads(flipped.decode()) != json.loads(text)
        except ValueError:
            continue
        assert durable.is_sealed(bytes(flipped), over) == (not is_other), flipped
    spread = text.replace(b": ", b" :  ")
    assert durable.is_sealed(spread, over) == (over == "content")
    assert not durable.is_sealed(b'{"name": 1}', over)


def test_every_kind_of_damage_is_told(tmp_path: Path) -> None:
    for name in ("good", "short", "changed", "gone", "ignored"):
        (tmp_path / name).write_text("content")
    records = [record for record in durable.folder_records(tmp_path) if record.name != "ignored"]
    assert durable.find_damage(tmp_path, records) == {}
    (tmp_path / "short").write_text("conten")
    (tmp_path / "changed").write_text("Content")
    (tmp_path / "gone").unlink()
    (tmp_path / "ignored").unlink()
    old, new = (xxhash.xxh3_128_hexdigest(text) for text in (b"content", b"Content"))
    assert durable.find_damage(tmp_path, records) == {
        tmp_path / "short": "expected 7 bytes, found 6",
        tmp_path / "changed": f"expected xxh3-128 {old}, found {new}: content differs from what was written",
        tmp_path / "gone": "is missing",
    }


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o022, 0o644), (0o077, 0o600)])
def test_a_file_of_a_library_follows_the_umask(umask: int, mode: int, tmp_path: Path) -> None:
    path = tmp_path / "private"
    path.touch(0o600)
    before = os.umask(umask)
    try:
        durable.follow_umask(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize(("before", "after"), [(b"", b"new\n"), (b"old\n", b"old\nnew\n"), (b"ol", b"ol\nnew\n")])
def test_a_line_torn_by_a_power_loss_swallows_no_line(tmp_path: Path, before: bytes, after: bytes) -> None:
    (tmp_path / "lines").write_bytes(before)
    durable.append_line(tmp_path / "lines", b"new")
    assert (tmp_path / "lines").read_bytes() == after


def test_a_file_that_may_not_be_read_is_no_damage(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    records = durable.folder_records(tmp_path)
    with unreadable(tmp_path / "file"), pytest.raises(PermissionError, match="file"):
        durable.find_damage(tmp_path, records)
    assert durable.find_damage(tmp_path, records) == {}
