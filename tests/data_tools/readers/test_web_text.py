"""WET files give the text of their conversion records, plain and compressed, whatever the chunk size."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from corpora import write_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from read_texts import rejects_of, texts_of

from pretrain.errors import DataError


def record(content: bytes, kind: str = "conversion", *more: str) -> bytes:
    header = ["WARC/1.0", f"WARC-Type: {kind}", "WARC-Target-URI: http://a.example/", *more]
    return "\r\n".join([*header, f"Content-Length: {len(content)}", "", ""]).encode() + content + b"\r\n\r\n"


INFO = record(b"Software-Info: x\r\n\r\n", "warcinfo")


@settings(max_examples=50, deadline=None)
@given(
    texts=st.lists(st.text(st.sampled_from("a \r\nWARC/1.0:é"), max_size=30), min_size=1, max_size=8),
    size=st.integers(1, 300),
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_records_survive_any_chunking(texts: list[str], size: int, suffix: str, tmp_path_factory):  # noqa: ANN001
    data = INFO + b"".join(record(text.encode()) + record(b"x", "metadata") for text in texts)
    path = write_bytes(tmp_path_factory.mktemp("wet") / f"x.warc.wet{suffix}", data)
    assert texts_of(path, chunk_bytes=size) == [text.replace("\r\n", "\n").strip("\n") for text in texts]


def test_one_gzip_member_per_record_as_common_crawl_writes(tmp_path: Path):
    path = tmp_path / "x.warc.wet.gz"
    path.write_bytes(gzip.compress(INFO) + b"".join(gzip.compress(record(b"%d\n" % number)) for number in range(200)))
    assert texts_of(path, chunk_bytes=1000) == [str(number) for number in range(200)]


def test_bad_records(tmp_path: Path):
    path = write_bytes(
        tmp_path / "x.wet", INFO + record(b"a") + record(b"b\xff\n\nc") + record(b"d" * 500) + record(b"e")
    )
    with pytest.raises(DataError, match=r"x.wet:\d+: byte \d+ \(0xff\) is not UTF-8"):
        texts_of(path)
    for size in (30, 1 << 20):
        found = rejects_of(path, on_error="skip", max_document_bytes=300, chunk_bytes=size)
        assert found[0] == ["a", "e"]
        assert [reason for reason, _ in found[1]] == ["not_utf8", "too_many_bytes"]
        assert rejects_of(path, on_error="replace", chunk_bytes=size)[0] == ["a", "b\ufffd\n\nc", "d" * 500, "e"]


@pytest.mark.parametrize("size", [16, 1 << 20])
def test_damage_is_named_with_the_last_sound_byte(tmp_path: Path, size: int):
    good = INFO + record(b"a") + record(b"b")
    end = len(good) - 4
    for tail in (
        b"garbage\r\n\r\n" * 9,
        record(b"c" * 99)[:-60],
        b"WARC/1.0\r\nno: length\r\n\r\n",
        b"WARC/1.0\r\n" + b"x" * 70000,
    ):
        path = write_bytes(tmp_path / "x.wet", good + tail)
        with pytest.raises(DataError, match=f"x.wet: damaged: .*follows byte {end}"):
            texts_of(path, chunk_bytes=size)
        assert rejects_of(path, chunk_bytes=size, on_error="skip")[:2] == (["a", "b"], [("damaged_file", None)])


def test_responses_are_not_text(tmp_path: Path):
    with pytest.raises(DataError, match="x.warc: holds no conversion record; give WET files"):
        texts_of(write_bytes(tmp_path / "x.warc", INFO + record(b"<html>", "response")))
