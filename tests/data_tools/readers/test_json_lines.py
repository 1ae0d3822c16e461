"""JSON as Python writes it is read: what is odd in another field than the text is no reason to lose the text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from corpora import write_bytes
from read_texts import rejects_of, texts_of

from data_tools.readers import ReadOptions, expand_inputs, parse_chunk, read_chunks
from data_tools.readers.layouts import LOOK_BYTES
from pretrain.errors import DataError


@pytest.mark.parametrize(
    "other", ["NaN", "Infinity", "-Infinity", '"\\ud83d"', '["\\udc00", NaN]', "1e999", "9" * 5000, "-" + "9" * 5000]
)
def test_the_text_beside_what_only_python_writes(tmp_path: Path, other: str):
    lines = [f'{{"other": {other}, "text": "a"}}', '{"text": "b"}', f'{{"text": "c", "other": {other}}}']
    path = write_bytes(tmp_path / "x.jsonl", "\n".join(lines).encode())
    for on_error in ("stop", "skip", "replace"):
        assert rejects_of(path, on_error=on_error) == (["a", "b", "c"], [], 0)


def test_half_a_surrogate_pair_in_the_text(tmp_path: Path):
    path = write_bytes(tmp_path / "x.jsonl", json.dumps({"n": float("nan"), "text": "a\ud83db"}).encode())
    with pytest.raises(
        DataError, match=r"x.jsonl:1: broken JSON .*\\ud83d is half of a surrogate pair.*--on-error replace"
    ):
        texts_of(path)
    assert rejects_of(path, on_error="skip") == ([], [("broken_json", 1)], 0)
    assert rejects_of(path, on_error="replace") == (["a\ufffdb"], [], 1)


def test_byte_order_marks_of_files_behind_one_another(tmp_path: Path):
    path = write_bytes(tmp_path / "x.jsonl", b'\xef\xbb\xbf{"text": "a"}\n\xef\xbb\xbf{"text": "a", "text": "b"}\n')
    assert texts_of(path) == ["a", "b"]


def test_a_bracket_where_the_first_look_ends_is_no_document(tmp_path: Path):
    begin = '{"text": "'
    for end in "[{,":
        text = "a" * (LOOK_BYTES - len(begin) - 1) + end + "b"
        assert texts_of(write_bytes(tmp_path / "x.jsonl", f'{begin}{text}"}}\n'.encode())) == [text]


def test_what_is_no_text_is_said_with_a_remedy(tmp_path: Path):
    lines = ['{"text": ["a", "b"]}', '{"text": {"body": "a"}}', '{"body": 1}', '{"text": ' + "[" * 3000, "// a"]
    lines.append('{"text": [{"text": "a"}]}')
    path = write_bytes(tmp_path / "x.jsonl", "\n".join(lines).encode())
    options = ReadOptions(on_error="skip")
    chunks = read_chunks(expand_inputs([path], options), options)
    messages = [reject.message for chunk in chunks for reject in parse_chunk(chunk, options).rejects]
    expected = ["found list; join its parts", "such as text.body", "the keys are: body", "broken JSON", "broken JSON"]
    expected.append("`jq -c '.text[]'`")
    assert [words in message for words, message in zip(expected, messages, strict=True)] == [True] * 6, messages


@pytest.mark.parametrize(
    ("bad", "words"),
    [(b"caf\xe9", "iconv -f latin1"), (b"\x93so\x94", "iconv -f windows-1252"), (b"\x93\0\0\1", "not look like text")],
)
def test_bytes_of_other_encodings_get_a_remedy_that_fits(tmp_path: Path, bad: bytes, words: str):
    with pytest.raises(DataError, match=f"x.jsonl:1: byte .* is not UTF-8: .*{words}"):
        texts_of(write_bytes(tmp_path / "x.jsonl", b'{"text": "' + bad + b'"}\n'))
