"""Documents come out whole and in order whatever the chunk size and compression; every mistake names file and line."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
import zstandard
from corpora import write_bytes, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from project import SAMPLE

from data_tools.readers import ReadOptions, expand_inputs, parse_chunk, read_chunks
from pretrain.errors import DataError

LINES = st.text(st.sampled_from("ab \t\u2028\x85é中\x00"), min_size=1, max_size=12).filter(
    lambda line: line.strip(" \t")
)
PARAGRAPHS = st.lists(st.lists(LINES, min_size=1, max_size=4).map("\n".join), min_size=1, max_size=8)


def texts_of(path: Path, **values: object) -> list[str]:
    options = ReadOptions(**values)  # type: ignore[arg-type]
    chunks = read_chunks(expand_inputs([path], options), options)
    return [text for chunk in chunks for text in parse_chunk(chunk, options).texts]


def write(folder: Path, name: str, data: bytes) -> Path:
    return write_bytes(folder / name, data)


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=10),
    size=st.integers(1, 90),
)
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_json_lines_survive_any_chunking(
    documents: list[str], size: int, suffix: str, tmp_path_factory: pytest.TempPathFactory
):
    path = write_jsonl(tmp_path_factory.mktemp("jsonl") / f"x.jsonl{suffix}", documents)
    assert texts_of(path, chunk_bytes=size) == documents


@settings(max_examples=60, deadline=None)
@given(
    documents=PARAGRAPHS,
    size=st.integers(1, 60),
    blank=st.sampled_from(["\n", "\n\n", " \n", "\t\n \n"]),
    ending=st.sampled_from(["", "\n", "\n\n"]),
    newline=st.sampled_from(["\n", "\r\n"]),
    bom=st.booleans(),
)
def test_text_survives_any_chunking(documents, size, blank, ending, newline, bom, tmp_path_factory):  # noqa: ANN001
    text = ("\ufeff" if bom else "") + ("\n" + blank).join(documents) + ending
    path = write(tmp_path_factory.mktemp("txt"), "x.txt", text.replace("\n", newline).encode())
    assert texts_of(path, chunk_bytes=size) == documents


def test_json_lines_with_bom_crlf_blank_lines_and_no_last_newline(tmp_path: Path):
    data = '\ufeff{"text": "a"}\r\n\r\n  \n{"text": "b\\u2028c"}'.encode()
    assert texts_of(write(tmp_path, "x.jsonl", data)) == ["a", "b\u2028c"]


def test_several_zstandard_frames_and_gzip_members(tmp_path: Path):
    parts = [b'{"text": "a"}\n{"te', b'xt": "b"}\n']
    (tmp_path / "x.jsonl.zst").write_bytes(b"".join(zstandard.compress(part) for part in parts))
    one, two = (write(tmp_path, f"{i}.jsonl.gz", part).read_bytes() for i, part in enumerate(parts))
    (tmp_path / "x.jsonl.gz").write_bytes(one + two)
    assert texts_of(tmp_path / "x.jsonl.zst") == texts_of(tmp_path / "x.jsonl.gz") == ["a", "b"]


def test_sample_corpus_has_514_documents():
    texts = texts_of(SAMPLE)
    assert len(texts) == 514
    assert all(text.strip() for text in texts)


@pytest.mark.parametrize("size", [4, 1 << 18])
@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "a"', ["x.jsonl:3", "broken JSON"]),
        (b'{"text": "\\ud800"}', ["x.jsonl:3", "broken JSON"]),
        (b'{"body": "a", "id": 1}', ["x.jsonl:3", "'text'", "body, id", "--json-key"]),
        (b"{}", ["x.jsonl:3", "none"]),
        (b'{"text": null}', ["x.jsonl:3", "'text'", "null"]),
        (b'{"text": 7}', ["x.jsonl:3", "int"]),
        (b'["a"]', ["x.jsonl:3", "object", "list"]),
        (b'{"text": "\xff"}', ["x.jsonl:3", "byte 38 (0xff)", "UTF-8", "iconv"]),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, words: list[str], size: int):
    data = b'{"text": "a"}\n{"text": "b"}\n' + line + b'\n{"text": "c"}\n'
    with pytest.raises(DataError) as caught:
        texts_of(write(tmp_path, "x.jsonl", data), chunk_bytes=size)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("size", [4, 1 << 18])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_text_that_is_not_utf8_is_named_with_line_and_offset(tmp_path: Path, size: int, bom: bytes):
    path = write(tmp_path, "x.txt", bom + b"one\n\ntwo\nthr\xe9e\n")
    with pytest.raises(DataError, match=rf"x.txt:4: byte {12 + len(bom)} \(0xe9\)"):
        texts_of(path, chunk_bytes=size)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_truncated_compressed_files_are_named(tmp_path: Path, suffix: str):
    path = write_jsonl(tmp_path / f"x.jsonl{suffix}", [str(i) * 50 for i in range(2000)])
    data = path.read_bytes()
    for size in (1, 5, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(DataError, match=f"x.jsonl{suffix}.*damaged or truncated"):
            texts_of(path)


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.txt.zst"])
def test_compressed_nothing_is_an_error(tmp_path: Path, name: str):
    with pytest.raises(DataError, match=f"{name}: is empty"):
        texts_of(write(tmp_path, name, b""))


def test_all_bad_inputs_are_named_at_once(tmp_path: Path):
    (tmp_path / "image.png").write_bytes(b"x")
    with pytest.raises(DataError) as caught:
        expand_inputs([tmp_path / "missing.txt", tmp_path / "image.png", "/dev/null"])
    assert all(word in str(caught.value) for word in ("missing.txt: No such", "image.png: unknown", "not a file"))


@pytest.mark.parametrize(("name", "what"), [("x.jsonl", "line"), ("x.txt", "document"), ("y.txt", "document")])
def test_documents_over_the_limit_are_refused(tmp_path: Path, name: str, what: str):
    data = {
        "x.jsonl": b'{"text": "a"}\n{"text": "' + b"b" * 5000,
        "x.txt": b"a\n" + b"b" * 5000,
        "y.txt": b"a\n\n" + b"bb\n" * 2000,
    }
    path = write(tmp_path, name, data[name])
    with pytest.raises(DataError, match=rf"{name}:\d+: a {what} of more than 1000 bytes"):
        texts_of(path, chunk_bytes=64, max_document_bytes=1000)
    assert texts_of(
        write(tmp_path, "z.jsonl", b'{"text": "' + b"b" * 900 + b'"}'), chunk_bytes=64, max_document_bytes=1000
    )


def test_zstandard_bomb_is_read_in_bounded_pieces(tmp_path: Path):
    path = write(tmp_path, "x.jsonl.zst", b" " * (256 << 20))
    assert path.stat().st_size < 30_000
    tracemalloc.start()
    with pytest.raises(DataError, match="a line of more than"):
        texts_of(path, max_document_bytes=1 << 20)
    assert tracemalloc.get_traced_memory()[1] < 80 << 20
    tracemalloc.stop()
