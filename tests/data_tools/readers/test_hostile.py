"""Damaged, hostile and misnamed files: an error that names file and place, or one counted reject; bounded memory."""

from __future__ import annotations

import io
import json
import random
import tracemalloc
from pathlib import Path

import pytest
import zstandard
from corpora import write_bytes, write_jsonl
from read_texts import rejects_of, texts_of

from data_tools.readers import ReadOptions, expand_inputs, parse_chunk, read_chunks
from data_tools.readers.compression import DamagedError, read_blocks
from pretrain.errors import ConfigError, DataError

COMPRESSED = [".gz", ".zst", ".bz2", ".xz"]


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_members_behind_one_another(tmp_path: Path, suffix: str):
    parts = [b'{"text": "a"}\n{"te', b'xt": "b"}\n', b"", b'{"text": "c"}']
    data = b"".join(write_bytes(tmp_path / f"part{suffix}", part).read_bytes() for part in parts)
    (tmp_path / f"x.jsonl{suffix}").write_bytes(data)
    for size in (1, 10, 1 << 20):
        assert texts_of(tmp_path / f"x.jsonl{suffix}", chunk_bytes=size) == ["a", "b", "c"]
    for end in range(1, len(data)):
        (tmp_path / f"x.jsonl{suffix}").write_bytes(data[:end])
        try:
            texts = texts_of(tmp_path / f"x.jsonl{suffix}")
        except DataError as error:
            assert f"x.jsonl{suffix}" in str(error)  # noqa: PT017 - cut between members, it is a sound file
        else:
            assert texts in (["a", "b"], ["a", "b", "c"])


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("how", ["truncated", "damaged", "garbage behind"])
def test_damaged_streams_keep_what_stands_before(tmp_path: Path, suffix: str, how: str):
    texts = [random.Random(number).randbytes(300).hex() for number in range(2000)]
    path = write_jsonl(tmp_path / f"x.jsonl{suffix}", texts)
    if suffix == ".zst":  # with a checksum, as the zstd program writes it; without one, damage may not show
        plain = zstandard.decompress(path.read_bytes())
        path.write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(plain))
    data = bytearray(path.read_bytes())
    if how == "truncated":
        del data[len(data) * 3 // 4 :]
    elif how == "damaged":
        middle = len(data) * 3 // 4
        data[middle : middle + 64] = bytes(64)
    else:
        data += b"this is no member of any kind"
    path.write_bytes(data)
    # gzip has its checksum at the end, so what is damaged may first show as a broken line.
    named = rf"x.jsonl{suffix}: damaged or truncated {suffix} file .* decompressed bytes|x.jsonl{suffix}:\d+: "
    with pytest.raises(DataError, match=named):
        texts_of(path)
    found, rejects, _ = rejects_of(path, on_error="skip")
    lost = [reason for reason, _ in rejects]
    assert lost.count("damaged_file") == 1
    # Without a checksum before the damage, lines behind it may be broken, and are then lost one by one.
    sound = {"garbage behind": 1000, "truncated": 1000, "damaged": 500}[how] if suffix != ".bz2" else 0
    assert found[:sound] == texts[:sound]
    assert len(found) >= sound


def test_every_sort_of_zstandard_frame_is_read_to_its_end(tmp_path: Path):
    """With and without size, checksum, content; skippable frames; cut anywhere, it is a damaged file."""
    frames, contents = [], []
    for size in (0, 1, 200, 300, 70_000, 300_000):
        for with_size in (True, False):
            for with_checksum in (True, False):
                compressor = zstandard.ZstdCompressor(write_content_size=with_size, write_checksum=with_checksum)
                content = bytes(size) if size % 3 else b"".join(b"%d" % number for number in range(size // 5))
                writer = io.BytesIO()
                with compressor.stream_writer(writer, size=len(content) if with_size else -1, closefd=False) as stream:
                    stream.write(content)
                frames.append(writer.getvalue())
                contents.append(content)
    frames.append(b"\x53\x2a\x4d\x18" + (1000).to_bytes(4, "little") + bytes(1000))
    contents.append(b"")
    path = tmp_path / "x.jsonl.zst"
    for frame in frames:
        for cut in {1, 3, 4, 5, 6, 7, 8, 9, len(frame) // 2, len(frame) - 4, len(frame) - 1} & set(
            range(1, len(frame))
        ):
            path.write_bytes(frame[:cut])
            with pytest.raises(DamagedError, match=r"x\.jsonl\.zst: damaged or truncated \.zst file"):
                list(read_blocks(str(path), "zst", 1000))
    path.write_bytes(b"".join(frames))
    for size in (1 << 12, 1 << 20):
        assert b"".join(block for block, _ in read_blocks(str(path), "zst", size)) == b"".join(contents)


@pytest.mark.parametrize(
    "suffix", [".gz", ".zst", *(pytest.param(name, marks=pytest.mark.slow) for name in (".bz2", ".xz"))]
)
def test_bombs_are_stopped_by_their_ratio(tmp_path: Path, suffix: str):
    line = json.dumps({"text": "a" * 999_000}).encode() + b"\n"
    path = write_bytes(tmp_path / f"x.jsonl{suffix}", line * 80)
    tracemalloc.start()
    chunks = read_chunks(expand_inputs([path]), ReadOptions(max_ratio=300))
    with pytest.raises(DataError, match=rf"x.jsonl{suffix}: unfolds to more than 300 times its size, .*--max-ratio"):
        all(chunk.held_bytes < 6 << 20 for chunk in chunks)
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()
    assert len(texts_of(path, max_ratio=0)) == 80


@pytest.mark.parametrize("suffix", ["", ".zst"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("kind", ["jsonl", "txt", "csv"])
def test_utf16_is_said(tmp_path: Path, suffix: str, encoding: str, kind: str):
    path = write_bytes(tmp_path / f"x.{kind}{suffix}", '\ufefftext\n{"text": "a"}\n'.encode(encoding))
    for on_error in ("stop", "skip"):
        with pytest.raises(DataError, match=rf"x.{kind}{suffix}: is UTF-16; convert it, .*iconv"):
            texts_of(path, on_error=on_error)


def test_replacement_of_what_is_not_unicode(tmp_path: Path):
    lines = [
        b'{"text": "a\xffb"}',
        b'{"text": "\\ud800c"}',
        b'{"text": "\\ud83d\\ude00"}',
        b'{"text": "\xff", ',
        b'{"text": 1}',
    ]
    path = write_bytes(tmp_path / "x.jsonl", b"\n".join(lines))
    texts, rejects, replaced = rejects_of(path, on_error="replace")
    assert texts == ["a\ufffdb", "\ufffdc", "\U0001f600"]
    assert rejects == [("broken_json", 4), ("not_a_string", 5)]
    assert replaced == 2
    texts, rejects, _ = rejects_of(path, on_error="skip")
    assert texts == ["\U0001f600"]
    assert [line for _, line in rejects] == [1, 2, 4, 5]
    path = write_bytes(tmp_path / "x.txt", b"a\n\nb\xff\nc\n\nd\n")
    assert rejects_of(path, on_error="replace") == (["a", "b\ufffd\nc", "d"], [], 1)
    assert rejects_of(path, on_error="skip") == (["a", "d"], [("not_utf8", 3)], 0)


def test_text_that_is_odd_but_sound(tmp_path: Path):
    odd = ["a\x00b", "\u2028", "\u202eabc", "e\u0301", "\ufeffx", " lead", "x" * 100_000]
    assert texts_of(write_jsonl(tmp_path / "x.jsonl", odd)) == odd
    assert texts_of(write_bytes(tmp_path / "x.txt", "\n\n".join(["y", *odd]).encode())) == ["y", *odd]


def test_keys_with_dots(tmp_path: Path):
    path = write_bytes(tmp_path / "x.jsonl", b'{"a": {"b": "path"}}\n{"a": {"b": "path"}, "a.b": "literal"}\n')
    assert texts_of(path, json_key="a.b") == ["path", "literal"]
    with pytest.raises(DataError, match=r"x.jsonl:1: no key 'a.c'; the keys are: a;"):
        texts_of(path, json_key="a.c")


def test_a_file_that_became_shorter(tmp_path: Path):
    path = write_jsonl(tmp_path / "x.jsonl", ["a" * 50] * 50)
    chunks = list(read_chunks(expand_inputs([path]), ReadOptions(chunk_bytes=1000)))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"x.jsonl: became shorter while it was read: expected \d+ bytes or more"):
        [parse_chunk(chunk) for chunk in chunks]


def test_a_line_without_end_is_passed_over_in_bounded_memory(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "a"}\n{"text": "')
        file.truncate(300 << 20)
        file.seek(0, 2)
        file.write(b'"}\n{"text": "b"}\n')
    tracemalloc.start()
    found = rejects_of(path, on_error="skip", max_document_bytes=1 << 20)
    assert tracemalloc.get_traced_memory()[1] < 40 << 20
    tracemalloc.stop()
    assert found == (["a", "b"], [("too_many_bytes", 2)], 0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"on_error": "ignore"}, "--on-error ignore: expected one of stop, skip, replace"),
        ({"text_documents": "page"}, "--text-documents page: expected one of blank-line, line, file"),
        ({"max_document_bytes": "lots"}, "--max-document-bytes lots: expected a number of bytes"),
        ({"max_document_bytes": 0}, "--max-document-bytes 0: expected at least 1"),
        ({"delimiter": "ab"}, "--delimiter 'ab': expected one ASCII character"),
        ({"input_format": "pdf"}, "--input-format pdf: expected one of jsonl, txt, csv"),
        ({"input_format": "parquet.gz"}, "parquet is compressed inside; unpack the file, and give parquet"),
        ({"input_format": "jsonl.rar"}, "--input-format jsonl.rar: expected"),
        ({"json_key": ""}, "--json-key .*: is empty"),
        ({"jsonkey": "a"}, "jsonkey: no such reading options"),
    ],
)
def test_options_that_cannot_work(values: dict[str, object], words: str):
    with pytest.raises(ConfigError, match=words):
        ReadOptions.parse(**values)


def test_options_as_typed():
    options = ReadOptions.parse(delimiter="\\t", max_document_bytes="64M", chunk_bytes="1GiB", input_format=None)
    assert (options.delimiter, options.max_document_bytes, options.chunk_bytes) == ("\t", 64 << 20, 1 << 30)
    assert options.input_format is None


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["", ".zst", ".gz"])
def test_a_line_of_200_megabytes(tmp_path: Path, suffix: str):
    path = write_jsonl(tmp_path / f"x.jsonl{suffix}", ["a", "long " * 40_000_000, "b"])
    assert [len(text) for text in texts_of(path, max_ratio=0)] == [1, 200_000_000, 1]
    found = rejects_of(path, on_error="skip", max_document_bytes=10**8, max_ratio=0)
    assert found == (["a", "b"], [("too_many_bytes", 2)], 0)
