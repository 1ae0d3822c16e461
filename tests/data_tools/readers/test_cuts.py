"""Any chunk size, compression, shards and continuation give the documents of a naive parse of the whole file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from corpora import write_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from read_texts import cut_in_shards

from data_tools.readers import LineNumbers, ReadOptions, expand_inputs, parse_chunk, read_chunks
from pretrain.errors import DataError

# Lines of text that are hostile to cutting: blank ones of every sort, long ones, carriage returns in odd places.
LINE = st.sampled_from(
    ["", "", " ", "\t \x0b", "\r", "a", "bb", " c", "é中", "\u2028", "x" * 40, "d\r", "\x85", "e \r\r"]
)
BYTES = st.tuples(st.booleans(), st.lists(LINE, max_size=25), st.sampled_from(["\n", "\r\n"]), st.booleans()).map(
    lambda t: (("\ufeff" if t[0] else "") + t[2].join(t[1]) + (t[2] if t[3] else "")).encode()
)
SUFFIXES = ["", ".gz", ".zst", ".bz2", ".xz"]


def naive_text(data: bytes, by: str) -> list[str]:
    text = data.decode("utf-8-sig").replace("\r\n", "\n")
    if by == "line":
        return [line for line in text.split("\n") if line.strip(" \t\r\v\f")]
    parts = [text] if by == "file" else re.split(r"\n(?:[ \t\r\v\f]*\n)+", f"\n{text}\n")
    return [part.strip("\n") for part in parts if part.strip("\n")]


def read(paths: list[Path], **values: object) -> list[list[str]]:
    options = ReadOptions(**values)  # type: ignore[arg-type]
    return [parse_chunk(chunk, options).texts for chunk in read_chunks(expand_inputs(paths, options), options)]


@settings(max_examples=60, deadline=None)
@given(data=BYTES, size=st.integers(1, 70), by=st.sampled_from(["blank-line", "line", "file"]))
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_text_equals_a_naive_parse(data: bytes, size: int, by: str, suffix: str, tmp_path_factory):  # noqa: ANN001
    if not data.removeprefix(b"\xef\xbb\xbf"):
        return  # an empty file is left out
    path = write_bytes(tmp_path_factory.mktemp("t") / f"x.txt{suffix}", data)
    texts = read([path], chunk_bytes=size, text_documents=by)
    assert [text for part in texts for text in part] == naive_text(data, by)


@settings(max_examples=60, deadline=None)
@given(
    files=st.lists(
        st.tuples(st.sampled_from(["txt", "jsonl", "csv", "wet"]), st.sampled_from(SUFFIXES), BYTES),
        min_size=1,
        max_size=4,
    ),
    size=st.integers(1, 200),
    num_shards=st.integers(1, 7),
    by=st.sampled_from(["blank-line", "line", "file"]),
)
def test_shards_and_continuations_are_parts_of_the_whole(files, size, num_shards, by, tmp_path_factory):  # noqa: ANN001
    folder = tmp_path_factory.mktemp("s")
    paths = []
    for number, (kind, suffix, data) in enumerate(files):
        if kind == "jsonl":
            data = "".join(json.dumps({"text": text}) + "\n" for text in naive_text(data, "line")).encode()
        elif kind == "csv":
            data = b"text\n" + b"".join(b'"%d\n"\n' % place for place in range(1 + len(data) % 9))
        elif kind == "wet":
            data = b"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: 1\r\n\r\na\r\n\r\n" * (1 + len(data) % 5)
        paths.append(write_bytes(folder / f"{number}.{kind}{suffix}", data.removeprefix(b"\xef\xbb\xbf") or b"\n"))
    options = ReadOptions(chunk_bytes=size, text_documents=by)
    sources = expand_inputs(paths, options)
    _, shards = cut_in_shards(sources, options, num_shards)
    for shard in shards:
        if len(shard) > 1:
            again = read_chunks(
                sources, options, shard=(shards.index(shard), num_shards), start=(shard[1].source, shard[1].number)
            )
            assert list(again) == shard[1:]


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(
        st.sampled_from([b'{"text": "a"}', b"", b"{", b'{"text": 1}', b'{"text": "\xff"}', b"x" * 50]), min_size=1
    ),
    size=st.integers(1, 60),
    suffix=st.sampled_from(SUFFIXES),
    data=st.data(),
)
def test_rejects_have_the_lines_and_bytes_of_the_file(lines, size, suffix, data, tmp_path_factory):  # noqa: ANN001
    path = write_bytes(tmp_path_factory.mktemp("r") / f"x.jsonl{suffix}", b"\n".join(lines))
    if path.stat().st_size == 0 or not b"\n".join(lines):
        return
    options = ReadOptions(chunk_bytes=size, on_error="skip", max_document_bytes=30)
    sources = expand_inputs([path], options)
    bad = [number for number, line in enumerate(lines) if line not in (b"", b'{"text": "a"}')]
    expected = [(number + 1, sum(len(line) + 1 for line in lines[:number])) for number in bad]
    offsets = dict(expected)
    numbers, found, texts = LineNumbers(), [], []
    chunks = list(read_chunks(sources, options))
    first = data.draw(st.integers(0, len(chunks) - 1))
    for chunk in chunks:
        parsed = parse_chunk(chunk, options)
        texts += parsed.texts
        found += numbers.locate(parsed.rejects, parsed.lines)
    assert texts == ["a"] * lines.count(b'{"text": "a"}')
    assert [reject.line for reject in found] == [line for line, _ in expected]
    assert all(reject.byte in (offsets[reject.line], offsets[reject.line] + 10) for reject in found)
    later = LineNumbers()
    resumed = [parse_chunk(chunk, options) for chunk in read_chunks(sources, options, start=(0, chunks[first].number))]
    located = [reject for parsed in resumed for reject in later.locate(parsed.rejects, parsed.lines)]
    assert located == found[len(found) - len(located) :]
    if bad:
        with pytest.raises(DataError, match=rf"x.jsonl{suffix}:{bad[0] + 1}: "):
            read([path], chunk_bytes=size, max_document_bytes=30)
