"""Damage is found whatever bit it hits, and its place is told; nothing is read into memory as a whole."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dataset_builders import write_dataset, write_lengths
from fault_records import FaultRecorder

from pretrain.data import index_cache
from pretrain.data.dataset import verification
from pretrain.data.dataset.manifest import REMEDY, Manifest
from pretrain.data.dataset.verification import check
from pretrain.data.tokenizer.load import load_tokenizer

SENTENCES = [[[5, 6, 7], [8]], [[9, 10], [11], [12, 13, 14]], [], [[15]], [[16, 17], [18, 19]]]


@contextmanager
def flipped(path: Path, bit: int) -> Iterator[None]:
    """The file with one bit changed, for a while."""
    good = path.read_bytes()
    damaged = bytearray(good)
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    try:
        yield
    finally:
        path.write_bytes(good)


@pytest.mark.slow
@pytest.mark.fault("data-index")
@pytest.mark.parametrize("documents", [SENTENCES, [[[5, 6, 7]], [[8]], [[9, 10]], [[11]]]])
def test_every_flipped_bit_of_the_index_is_found(tmp_path: Path, documents: list[list[list[int]]]) -> None:
    manifest = write_dataset(tmp_path / "a", documents)
    path = tmp_path / "a.idx"
    for bit in range(8 * manifest.idx_bytes):
        with flipped(path, bit):
            (problem,) = check(tmp_path / "a").problems
        assert (problem.file, problem.bytes) == (str(path), (0, manifest.idx_bytes))
        assert f"expected xxh64 {manifest.idx_xxh64}, found" in problem.message
    assert check(tmp_path / "a").problems == []


@pytest.mark.parametrize(
    ("offset", "content", "named"),
    [
        (0, b"X", "magic: expected b'MMIDIDX"),
        (9, b"\2", "version: expected 1, found 2"),
        (17, b"\7", "dtype code: expected an integer type"),
        (18, struct.pack("<Q", 2**60), "size: expected"),
        (34 + 8, struct.pack("<i", -1), "sequence length 2: expected at least 0, found -1"),
        (66 + 24, struct.pack("<q", 2**60), "sequence pointer 3: expected 12, found 1152921504606"),
        (130 + 16, struct.pack("<q", 9), "document index 3: expected at least 9, found 5"),
        (130 + 16, struct.pack("<q", 4), "restore it from a copy"),  # in order, so that nothing contradicts it
    ],
)
def test_the_first_field_of_a_damaged_index_that_contradicts_others_is_told(
    tmp_path: Path, offset: int, content: bytes, named: str
) -> None:
    write_dataset(tmp_path / "a", SENTENCES)
    with (tmp_path / "a.idx").open("r+b") as file:
        file.seek(offset)
        file.write(content)
    (problem,) = check(tmp_path / "a").problems
    assert problem.message.partition("; ")[2].startswith(named)


def test_an_index_that_fits_a_damaged_file_of_tokens_is_not_blamed_for_it(tmp_path: Path) -> None:
    manifest = write_lengths(tmp_path / "a", [3, 1, 4])
    data = bytearray((tmp_path / "a.idx").read_bytes())
    data[-16] ^= 1  # the second document begins one sequence earlier or later
    (tmp_path / "a.idx").write_bytes(data)
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:-2])
    problems = check(tmp_path / "a").problems
    assert [Path(problem.file).suffix for problem in problems] == [".idx", ".bin"]
    assert problems[0].message.partition("; ")[2] == REMEDY
    assert problems[1].message.startswith(f"expected {manifest.bin_bytes} bytes")


@pytest.mark.parametrize("threads", [1, 3])
def test_damaged_chunks_are_told_in_order_by_any_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr("pretrain.data.dataset.dataset_writer.CHUNK_BYTES", 64)
    monkeypatch.setattr(verification, "_BLOCK", 24)
    manifest = write_lengths(tmp_path / "a", [1000])
    path = tmp_path / "a.bin"
    data = bytearray(path.read_bytes())
    for chunk in (2, 11, 30):
        data[64 * chunk + 5] ^= 4
    path.write_bytes(data)
    read: list[int] = []
    problems = check(tmp_path / "a", threads=threads, on_progress=read.append).problems
    assert [problem.bytes for problem in problems] == [(128, 192), (704, 768), (1920, 1984)]
    assert problems[0].message.startswith("chunk 2, bytes 128 to 192: expected xxh64")
    assert sum(read) == manifest.bin_bytes + manifest.idx_bytes == verification.count_bytes(tmp_path / "a")


@pytest.mark.fault("data-size")
def test_a_truncated_bin_tells_what_is_missing_and_what_else_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.data.dataset.dataset_writer.CHUNK_BYTES", 64)
    write_lengths(tmp_path / "a", [100])
    data = bytearray((tmp_path / "a.bin").read_bytes()[:150])
    data[70] ^= 1
    (tmp_path / "a.bin").write_bytes(data)
    problems = check(tmp_path / "a").problems
    assert problems[0].message.startswith("expected 200 bytes, found 150")
    assert [problem.bytes for problem in problems] == [(150, 200), (64, 128)]
    (tmp_path / "a.bin").unlink()
    assert "a.bin: cannot be read: No such file" in str(check(tmp_path / "a").problems[0])


def test_deep_finds_ids_that_were_written_outside_the_vocabulary(tmp_path: Path) -> None:
    write_lengths(tmp_path / "a", [40, 0, 10], vocab_size=100)
    sound = check(tmp_path / "a", deep=True)
    ids = np.fromfile(tmp_path / "a.bin", "<u2")
    assert (sound.problems, sound.largest_id, sound.empty_documents) == ([], int(ids.max()), 1)
    assert check(tmp_path / "a").largest_id is None
    manifest = Manifest.load(tmp_path / "a.json")
    limit = int(np.sort(ids)[-3])  # as another program might have written it: two ids or more are too large
    info = replace(manifest.tokenizer, vocab_size=limit)
    replace(manifest, tokenizer=info).save(tmp_path / "a.json")
    (problem,) = check(tmp_path / "a", deep=True).problems
    place = int(np.flatnonzero(ids >= limit)[0])
    others = int((ids >= limit).sum()) - 1
    assert f"byte {2 * place}: token id {ids[place]} is not in the vocabulary of {limit}" in problem.message
    assert f"nor are {others} more" in problem.message
    assert check(tmp_path / "a").problems == []


def test_a_disk_that_cannot_be_read_is_a_problem_with_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.data.dataset.dataset_writer.CHUNK_BYTES", 64)
    write_lengths(tmp_path / "a", [100])
    real = os.pread

    def broken(file: int, size: int, offset: int) -> bytes:
        if offset == 128:
            raise OSError(5, "Input/output error")
        return real(file, size, offset)

    monkeypatch.setattr(verification.os, "pread", broken)
    (problem,) = check(tmp_path / "a").problems
    assert problem.bytes == (128, 192)
    assert "cannot be read: Input/output error" in problem.message


def test_damage_of_the_manifest_stops_there(tmp_path: Path) -> None:
    write_lengths(tmp_path / "a", [3])
    path = tmp_path / "a.json"
    path.write_text(path.read_text().replace('"documents": 1', '"documents": 2'))
    (problem,) = check(tmp_path / "a").problems
    assert problem.file == str(path)
    assert "content differs from what was written" in problem.message


def test_two_hundred_random_bits_over_all_files_of_a_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: FaultRecorder
) -> None:
    monkeypatch.setattr("pretrain.data.dataset.dataset_writer.CHUNK_BYTES", 1 << 12)
    folder = tmp_path / "a.tokenizer"
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(95))])
    )
    tokenizer = load_tokenizer(tmp_path / "vocab.txt")
    tokenizer.save_pretrained(folder)
    generator = np.random.default_rng(5)
    manifest = write_lengths(tmp_path / "a", generator.integers(1, 90, 1000).tolist())
    replace(manifest, tokenizer=tokenizer.info).save(tmp_path / "a.json")
    assert check(tmp_path / "a").problems == []
    paths = [tmp_path / f"a.{name}" for name in ("bin", "idx", "json")] + sorted(folder.iterdir())
    for number in range(200):
        path = paths[number % len(paths)]
        bit = int(generator.integers(8 * path.stat().st_size))
        with flipped(path, bit):
            problems = check(tmp_path / "a").problems
        assert [problem.file for problem in problems] == [str(path)], problems
        if path.suffix in (".bin", ".idx") and path.parent == tmp_path:
            first, end = problems[0].bytes or (0, 0)
            most = 1 << 12 if path.suffix == ".bin" else manifest.idx_bytes
            assert first <= bit // 8 < end <= first + most, problems
    fault.record("data-size", injected=200, survived=200)


@pytest.mark.slow
def test_every_flipped_bit_of_an_index_table_is_found(tmp_path: Path) -> None:
    write_lengths(tmp_path / "a", [3, 9, 4])
    facts = {"version": 1, "name": "pack"}
    tables = {"starts": np.arange(5), "none": np.empty(0, np.int32), "blanks": np.full(200, 0x20, np.uint8)}
    folder = tmp_path / "a.index"
    folder.mkdir()
    path = folder / "pack-1.index"
    index_cache.write_tables(path, facts, tables)
    assert check(tmp_path / "a").problems == []
    for bit in range(8 * path.stat().st_size):
        with flipped(path, bit):
            assert index_cache.find_damage(path) is not None, bit
            assert index_cache.read_tables(path, facts) is None
    assert index_cache.find_damage(path) is None
    with flipped(path, 70 * 8):
        (problem,) = check(tmp_path / "a").problems
    assert problem.file == str(path)
    assert "is damaged: expected xxh64" in problem.message
