"""Corpora that are damaged, hostile or absurd, given to preprocessing as a user would.

By default the first fault ends the run, with file and line; `--on-error skip` counts and lists it. Nothing is lost
without being counted, nothing that looks finished is left by a run that failed, memory is bounded.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from data_programs import dataset_bytes, looks_finished, preprocess, rejects, run_data, write_lines

from pretrain.data.dataset.indexed_dataset import IndexedDataset
from pretrain.data.dataset.verification import verify
from pretrain.data.tokenizer.load import load_tokenizer

GOOD = b'{"text": "the cat"}\n'
BAD_LINES = [
    b'{"text": "the',
    b'{"text": "the"} tail',
    b"the cat",
    b'["the"]',
    b"7",
    b"null",
    b'{"body": "the"}',
    b"{}",
    b'{"text": null}',
    b'{"text": 7}',
    b'{"text": {"a": "b"}}',
    b'{"text": ["the"]}',
    b'{"text": true}',
    b'{"text": "\\ud800"}',
    b'{"text": "\\udc00\\ud800"}',
    b'{"text": "\xff"}',
    b'{"text": "\xed\xa0\x80"}',
    b'{"text": "\xc0\x80"}',
    b'{"text": "a\x00b"}',
    b'{"text": "a\tb"}',
    b"[" * 100_000,
    b'{"text": NaN}',
    b"\x00\x00\x00",
    b"\xff\xfe{",
]


def compress_with_checksum(data: bytes) -> bytes:
    """As the program zstd does; without a checksum nobody can tell damage."""
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": compress_with_checksum}


@pytest.mark.fault("input-lines")
def test_every_bad_line_is_listed_and_no_good_one_is_lost(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(GOOD + b"".join(line + b"\n" + GOOD for line in BAD_LINES))
    for workers in (0, 2):
        done = preprocess(
            tmp_path, "--input", "x.jsonl", "--on-error", "skip", "--workers", workers, "--overwrite", "--json"
        )
        report = json.loads(done.check().stdout)
        assert (report["documents"], report["rejects"]) == (len(BAD_LINES) + 1, len(BAD_LINES))
        assert sum(item["documents"] for item in report["dropped"].values()) == len(BAD_LINES)
        assert [reject["line"] for reject in rejects(tmp_path)] == [2 * i + 2 for i in range(len(BAD_LINES))]
        dataset = IndexedDataset(tmp_path / "out")
        assert len(dataset) == len(BAD_LINES) + 1
        assert len({dataset.document(i).tobytes() for i in range(len(dataset))}) == 1
        assert verify(tmp_path / "out") == []


@pytest.mark.fault("input-lines")
@pytest.mark.slow
@pytest.mark.parametrize("line", BAD_LINES[::3], ids=range(0, len(BAD_LINES), 3))
def test_a_bad_line_ends_the_run_with_file_and_line(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "x.jsonl").write_bytes(GOOD + GOOD + line + b"\n" + GOOD)
    preprocess(tmp_path, "--input", "x.jsonl").check_error("x.jsonl:3")
    assert looks_finished(tmp_path) == []


def test_rejects_have_a_budget(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(GOOD + b"".join(line + b"\n" for line in BAD_LINES))
    words = ["--input", "x.jsonl", "--on-error", "skip", "--max-rejects"]
    preprocess(tmp_path, *words, 5).check_error("--max-rejects")
    assert looks_finished(tmp_path) == []
    preprocess(tmp_path, *words, len(BAD_LINES)).check()
    assert len(IndexedDataset(tmp_path / "out")) == 1


HOSTILE_TEXTS = [
    "the\u2028cat\u2029sat\u0085mat",
    "the \x00 cat \x01\x1b[31m",
    "cafe\u0301 the caf\u00e9",
    "\u202ethe \u05e9\u05dc\u05d5\u05dd cat\u202c \u0634",
    "\ufeffthe\ufeff cat",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 the \U0010ffff",
    "a" + "\u0301" * 3000,
    "the\u00a0cat\u3000sat\u200bmat",
    "\u0130\u0131\u017f\u1e9e\ufb03 the",
    "\u4e2d\u4e2d the \ud7ff\ue000",
    "[CLS] the [SEP] [MASK]",
    " \t\r\n the \r\n\r\n cat \n",
    "\u00ad\u2060 \u180e",
]


@pytest.mark.fault("input-lines")
@pytest.mark.slow
@pytest.mark.parametrize("escaped", [True, False], ids=["escaped", "raw"])
def test_hostile_unicode_has_the_same_ids_for_any_worker_count(tmp_path: Path, escaped: bool) -> None:
    lines = [json.dumps({"text": text}, ensure_ascii=escaped) for text in HOSTILE_TEXTS * 40]
    (tmp_path / "x.jsonl").write_text("\n".join(lines), encoding="utf-8", newline="")
    for workers in (0, 1, 2, 3):
        preprocess(tmp_path, "--input", "x.jsonl", "--workers", workers, output=f"out{workers}").check()
    expected = dataset_bytes(tmp_path, "out0")
    assert all(dataset_bytes(tmp_path, f"out{workers}") == expected for workers in (1, 2, 3))
    reference = [ids for ids in load_tokenizer(tmp_path / "vocab.txt").encode_batch(HOSTILE_TEXTS * 40) if ids]
    dataset = IndexedDataset(tmp_path / "out0")
    assert [dataset.document(i).tolist() for i in range(len(dataset))] == reference


@pytest.mark.fault("input-lines")
def test_what_is_not_utf8_is_named_skipped_or_replaced(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"the cat\n\nth\xe9 cat\n\nsat\xff\xfe\n\nmat")
    preprocess(tmp_path, "--input", "x.txt").check_error("x.txt:3", "byte 11", "0xe9")
    assert looks_finished(tmp_path) == []
    preprocess(tmp_path, "--input", "x.txt", "--on-error", "skip", output="skipped").check()
    assert len(IndexedDataset(tmp_path / "skipped")) == 2
    assert [reject["line"] for reject in rejects(tmp_path, "skipped")] == [3, 5]
    done = preprocess(tmp_path, "--input", "x.txt", "--on-error", "replace", "--json", output="replaced").check()
    assert json.loads(done.stdout)["replaced"] == 2
    replaced = IndexedDataset(tmp_path / "replaced")
    expected = load_tokenizer(tmp_path / "vocab.txt").encode_batch(
        ["the cat", "th\ufffd cat", "sat\ufffd\ufffd", "mat"]
    )
    assert [replaced.document(i).tolist() for i in range(4)] == expected


@pytest.mark.fault("archives")
@pytest.mark.slow
@pytest.mark.parametrize("suffix", [*COMPRESS, "parquet"])
def test_a_cut_or_damaged_compressed_file_is_named_and_nothing_looks_finished(tmp_path: Path, suffix: str) -> None:
    name, texts = f"x.jsonl.{suffix}", [f"the cat sat {i * i}" for i in range(5_000)]
    if suffix == "parquet":
        name = "x.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / name, row_group_size=500)
        data = (tmp_path / name).read_bytes()
    else:
        data = COMPRESS[suffix](b"".join(b'{"text": "%s"}\n' % text.encode() for text in texts))
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 0x10
    contents = [data[:1], data[: len(data) // 2], data[:-1], b"plain"]
    contents += [] if suffix == "parquet" else [bytes(damaged)]  # which has no checksum of its own
    for number, content in enumerate(contents):
        (tmp_path / name).write_bytes(content)
        done = preprocess(tmp_path, "--input", name, "--workers", number % 2 * 2, output=f"out{number}")
        done.check_error(name)
        assert looks_finished(tmp_path, f"out{number}") == []
    (tmp_path / name).write_bytes(data)
    preprocess(tmp_path, "--input", name, "--workers", 2, output="out1").check()  # the mended file, the same command
    assert len(IndexedDataset(tmp_path / "out1")) == len(texts)


@pytest.mark.fault("archives")
@pytest.mark.slow
@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_decompression_bomb_meets_its_limit_in_little_memory(tmp_path: Path, suffix: str) -> None:
    """A line of 600 MB in a file of a MB at most."""
    path = tmp_path / f"x.jsonl.{suffix}"
    path.write_bytes(COMPRESS[suffix](b" " * 1_000_000) * 600)  # several streams in one file are one text
    done = preprocess(tmp_path, "--input", path, "--max-document-bytes", "16M")
    done.check_error(path.name)
    assert done.peak_bytes < 400_000_000
    assert looks_finished(tmp_path) == []


@pytest.mark.fault("input-lines")
@pytest.mark.slow
def test_a_line_of_200_megabytes_can_be_skipped_in_little_memory(tmp_path: Path) -> None:
    with (tmp_path / "x.jsonl").open("wb") as file:
        file.write(GOOD + b'{"text": "')
        for _ in range(200):
            file.write(b"the cat " * 125_000)
        file.write(b'"}\n' + GOOD)
    words = ["--input", "x.jsonl", "--max-document-bytes", "1M"]
    preprocess(tmp_path, *words).check_error("x.jsonl:2")
    done = preprocess(tmp_path, *words, "--on-error", "skip").check()
    assert done.peak_bytes < 400_000_000
    assert [reject["line"] for reject in rejects(tmp_path)] == [2]
    assert len(IndexedDataset(tmp_path / "out")) == 2


@pytest.mark.fault("input-lines")
@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", ["x.jsonl", "empty"]), (b"\n\n \n", ["no document"]), (b'{"text": ""}\n{"text": " "}\n', ["2 empty"])],
)
def test_a_corpus_of_nothing_is_an_error(tmp_path: Path, content: bytes, words: list[str]) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    preprocess(tmp_path, "--input", "x.jsonl").check_error(*words)
    assert looks_finished(tmp_path) == []


@pytest.mark.fault("input-lines")
def test_a_corpus_of_one_token(tmp_path: Path) -> None:
    write_lines(tmp_path / "x.jsonl", ["the"])
    preprocess(tmp_path, "--input", "x.jsonl").check()
    dataset = IndexedDataset(tmp_path / "out")
    assert (len(dataset), dataset.num_tokens) == (1, 1)
    assert run_data(tmp_path, "verify", "out").check().stdout


@pytest.mark.fault("input-lines")
@pytest.mark.slow
@pytest.mark.parametrize("text", [b"the cat sat. ", b"thecatsat"], ids=["words", "one word"])
def test_a_document_of_100_million_characters(tmp_path: Path, text: bytes) -> None:
    """WordPiece: far below the thirty times the longest document that the help allows for any tokenizer."""
    count = 10**8 // len(text)
    with (tmp_path / "x.txt").open("wb") as file:
        for _ in range(100):
            file.write(text * (count // 100))
    done = preprocess(tmp_path, "--input", "x.txt").check()
    dataset = IndexedDataset(tmp_path / "out")
    assert (len(dataset), dataset.num_tokens) == (1, count // 100 * 100 * 4 if b" " in text else 1)
    assert done.peak_bytes < 150e6 + 6e8
