"""A sound file of another format, encoding or layout is said in every mode, with a remedy; it is never damaged."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from corpora import write_bytes
from read_texts import texts_of

from data_tools.readers import ReadOptions, expand_inputs
from data_tools.readers.compression import read_blocks
from pretrain.errors import DataError

LINE = b'{"text": "a"}\n'
DOCUMENT = json.dumps([{"text": "a"}, {"text": "b"}])


def zipped(name: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        file.writestr(name, LINE)
    return data.getvalue()


def tarred() -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as file:
        member = tarfile.TarInfo("in.jsonl")
        member.size = len(LINE)
        file.addfile(member, io.BytesIO(LINE))
    return data.getvalue()


def with_dictionary() -> bytes:
    dictionary = zstandard.train_dictionary(1000, [b"%d words of text %d" % (i, i * i) for i in range(1000)])
    return zstandard.ZstdCompressor(dict_data=dictionary).compress(LINE)


def with_window(log: int) -> bytes:
    """A frame of unknown size, as `zstd --long=LOG` makes from standard input."""
    parameters = zstandard.ZstdCompressionParameters(window_log=log, hash_log=12, chain_log=12)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(LINE) + compressor.flush()


def xz_of(dictionary_bytes: int) -> bytes:
    """A stream whose header asks for such a dictionary, without the memory that writing it would take."""
    data = bytearray(lzma.compress(LINE, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 4096}]))
    place = data.index(b"\x21\x01", 12) + 2
    data[place] = 2 * (dictionary_bytes.bit_length() - 1 - 12)
    return bytes(data)


OTHERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a.jsonl.gz": (
        lambda: zstandard.compress(LINE),
        "is not gzip but Zstandard; say so with --input-format jsonl.zst ",
    ),
    "b.jsonl.gz": (lambda: LINE * 9, "is not gzip but plain text; say so with --input-format jsonl.plain "),
    "c.txt.zst": (lambda: LINE * 9, "is not Zstandard but plain text; say so with --input-format txt.plain "),
    "d.jsonl": (lambda: gzip.compress(LINE), "begins as gzip; say so with --input-format jsonl.gz "),
    "e.csv": (lambda: bz2.compress(LINE), "begins as bzip2; .* or rename it to end in .csv.bz2"),
    "f.jsonl.xz": (
        lambda: lzma.compress(LINE, lzma.FORMAT_ALONE),
        r"is not xz but LZMA \(.lzma\); `xz -dc --format=lzma \S+f.jsonl.xz \| taco data preprocess --input - ",
    ),
    "g.jsonl": (lambda: zipped("in.jsonl"), r"is a zip archive; `unzip -p \S+g.jsonl \| taco"),
    "h.jsonl": (tarred, r"is a tar archive; `tar -xOf \S+h.jsonl \| taco"),
    "i.jsonl.gz": (lambda: gzip.compress(tarred()), r"is a tar archive inside its compression; `tar -xOf"),
    "j.jsonl.gz": (
        lambda: gzip.compress(gzip.compress(LINE)),
        "is gzip inside its compression; `gzip -dc .* jsonl.gz`",
    ),
    "k.csv": (lambda: zipped("xl/workbook.xml"), "is an Office document; export its text"),
    "l.txt": (lambda: b"%PDF-1.7\n%abc\n", "is PDF; extract its text"),
    "m.jsonl": (lambda: pickle.dumps(LINE), "is a Python pickle"),
    "n.parquet": (lambda: b"version https://git-lfs.github.com/spec/v1\noid x\n", "Git LFS pointer.*git lfs pull"),
    "o.jsonl.gz": (lambda: b"<!DOCTYPE html>\n<html>404</html>\n", "is not gzip but a page of HTML"),
    "H.jsonl": (lambda: b" <!doctype HTML>", "is a page of HTML or XML"),
    "I.parquet": (lambda: b"\xef\xbb\xbf<?xml version='1.0'?>\n<Error><Code>x", "is not Parquet but a page of HTML"),
    "J.jsonl": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(9), "is a picture; leave it out"),
    "p.parquet": (lambda: b"PARE" + bytes(100), "is not Parquet but encrypted Parquet; decrypt it"),
    "q.jsonl": (lambda: b"Obj\x01" + bytes(100), "is Avro; write it again as JSON lines or Parquet"),
    "r.parquet": (lambda: b"ORC" + bytes(100), "is not Parquet but ORC"),
    "s.tar.gz": (lambda: gzip.compress(tarred()), "is a tar archive; `tar -xOf"),
    "t.jsonl.lz4": (lambda: b"\x04\x22\x4d\x18\x60\x40", r"is LZ4; `lz4 -dc \S+t.jsonl.lz4 \|"),
    "u.parquet.zst": (lambda: zstandard.compress(b"PAR1"), r"unpack it: `zstd -dc \S+u.parquet.zst > \S+u.parquet`"),
    "v.jsonl.zst": (
        lambda: with_window(28),
        r"needs a window of 256 MiB, more than 128 MiB; `zstd -dc --long=28 \S+v.jsonl.zst \| taco data preprocess",
    ),
    "w.jsonl.zst": (with_dictionary, r"was compressed with a dictionary \(number \d+\)"),
    "x.jsonl.xz": (lambda: xz_of(1 << 30), r"needs 1 GiB of memory, more than 512 MiB; `xz -dc "),
    "y.warc": (lambda: b"filedesc://x 0 0 text/plain 10\n", "is not a WARC or WET file: it begins with 'filedesc"),
    "A.json": (lambda: DOCUMENT.encode(), r"is a JSON array.*`jq -c '.\[\]' \S+A.json > \S+A.jsonl`"),
    "B.jsonl": (lambda: json.dumps(json.loads(DOCUMENT), indent=1).encode(), r"JSON array.* > \S+B.new.jsonl`"),
    "C.json.gz": (lambda: gzip.compress(DOCUMENT.encode()), r"`gzip -dc \S+C.json.gz \| jq -c '.\[\]' > \S+C.jsonl`"),
    "D.json": (lambda: json.dumps({"text": "a"}, indent=2).encode(), r"is JSON on several lines.*`jq -c . "),
    "E.jsonl": (lambda: LINE.decode().encode("utf-32"), "is UTF-32; convert it, for example with `iconv -f utf-32 "),
    "F.csv": (lambda: "id,text\n1,a\n".encode("utf-16-le"), "is UTF-16LE without a byte-order mark.*iconv -f utf-16le"),
    "G.jsonl": (lambda: (LINE * 3).replace(b"\n", b"\r"), "lines end in CR alone; convert them.*`tr "),
}


@pytest.mark.parametrize("name", OTHERS)
def test_sound_files_of_another_kind_are_said_before_any_work(tmp_path: Path, name: str):
    make, words = OTHERS[name]
    (tmp_path / name).write_bytes(make())
    for on_error in ("stop", "skip", "replace"):
        with pytest.raises(DataError, match=rf"{name}: .*{words}") as caught:
            expand_inputs([tmp_path / name], ReadOptions(on_error=on_error))
        assert "damaged" not in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "formats"),
    [
        ("x.jsonl.gz", zstandard.compress(LINE), "jsonl.zst"),
        ("x.jsonl.gz", LINE * 9, "jsonl.plain"),
        ("x.jsonl", gzip.compress(LINE, mtime=0), "jsonl.gz"),
    ],
)
def test_the_advised_format_reads_the_file(tmp_path: Path, name: str, data: bytes, formats: str):
    (tmp_path / name).write_bytes(data)
    assert set(texts_of(tmp_path / name, input_format=formats)) == {"a"}


@pytest.mark.parametrize("name", ["A.json", "B.jsonl", "C.json.gz", "D.json", "E.jsonl", "G.jsonl"])
def test_the_advised_command_makes_a_file_that_is_read(tmp_path: Path, name: str):
    make, _ = OTHERS[name]
    (tmp_path / name).write_bytes(make())
    with pytest.raises(DataError) as caught:
        expand_inputs([tmp_path / name])
    command = str(caught.value).split("`")[1]
    if "jq" in command and shutil.which("jq") is None:
        pytest.skip("jq is not installed")
    subprocess.run(["bash", "-c", command], check=True)
    assert texts_of(command.split("> ")[-1])[0] == "a"


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_zeros_behind_a_whole_file_are_padding(tmp_path: Path, suffix: str):
    path = write_bytes(tmp_path / f"x.jsonl{suffix}", LINE)
    member = path.read_bytes()
    path.write_bytes(member + bytes(512) + member + bytes(1 << 19))
    assert texts_of(path) == ["a", "a"]
    path.write_bytes(member + b"this is no member of any kind")
    with pytest.raises(DataError, match="what follows its last whole member is of another format"):
        texts_of(path)


def test_windows_within_the_limit_are_read(tmp_path: Path):
    (tmp_path / "x.jsonl.zst").write_bytes(with_window(27))
    assert texts_of(tmp_path / "x.jsonl.zst") == ["a"]


@pytest.mark.parametrize("content", [b"ORCHARDS\n", b"PK is a name\n", b"BZh9 is one\n", b"Obj\n", b"7z\n", b"a\0b\n"])
def test_text_may_begin_with_the_letters_of_a_format(tmp_path: Path, content: bytes):
    assert texts_of(write_bytes(tmp_path / "x.txt", content)) == [content.decode().strip("\n")]


@pytest.mark.parametrize(
    "content", [b'["a"]\n{"text": "b"}\n', b'[\n{"text": "b"}\n{"text": "c"}\n', b'{\n{"text": "b"}\n{\n']
)
def test_a_broken_line_does_not_make_a_document_of_lines(tmp_path: Path, content: bytes):
    path = write_bytes(tmp_path / "x.jsonl", content)
    assert texts_of(path, on_error="skip")[0] == "b"


def test_a_file_that_cannot_be_read_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_bytes(tmp_path / "x.jsonl.gz", LINE)

    def refuse(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    for on_error in ("stop", "skip"):
        with pytest.raises(DataError, match="x.jsonl.gz: cannot be read: Permission denied$"):
            expand_inputs([path], ReadOptions(on_error=on_error))
    with pytest.raises(DataError, match="x.jsonl.gz: cannot be read: Permission denied$"):
        list(read_blocks(str(path), "gz", 100))
