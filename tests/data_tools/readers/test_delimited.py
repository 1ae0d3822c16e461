"""csv as Python's csv reads it, whatever the chunk size; tsv as GLUE writes it; every broken record is named."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest
from corpora import write_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from project import SHARED
from read_texts import rejects_of, texts_of

from data_tools.readers import ReadOptions, expand_inputs, parse_chunk, read_chunks
from data_tools.readers.delimited import RecordScanner
from pretrain.errors import ConfigError, DataError

FIELD = st.text(st.sampled_from('ab ",;\n\r\té中\u2028'), max_size=8)

SKIP = ReadOptions(on_error="skip")


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(FIELD, FIELD, FIELD), min_size=1, max_size=8),
    size=st.integers(1, 60),
    delimiter=st.sampled_from(",;\t"),
    newline=st.sampled_from(["\n", "\r\n"]),
    bom=st.booleans(),
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_csv_survives_any_chunking(rows, size, delimiter, newline, bom, suffix, tmp_path_factory):  # noqa: ANN001
    text = io.StringIO(newline="")
    # Python's writer leaves a carriage return without quotes, which no reader takes.
    quoting = csv.QUOTE_ALL if any("\r" in field for row in rows for field in row) else csv.QUOTE_MINIMAL
    writer = csv.writer(text, delimiter=delimiter, lineterminator=newline, quoting=quoting)
    writer.writerows([("id", "te,xt", "c"), *rows])
    data = ("\ufeff" if bom else "") + text.getvalue()
    path = write_bytes(tmp_path_factory.mktemp("csv") / f"x.csv{suffix}", data.encode())
    texts = texts_of(path, chunk_bytes=size, delimiter=delimiter, json_key="te,xt")
    assert texts == [row[1] for row in rows]


@settings(max_examples=300, deadline=None)
@given(
    data=st.lists(st.sampled_from(['"', '""', ",", "\n", "a", "\r\n"]), min_size=1, max_size=30).map("".join),
    size=st.integers(1, 9),
)
def test_scanner_cuts_where_python_ends_records(data: str, size: int):
    """Also with quotes in odd places, where Python's reader is lenient."""
    reader = csv.reader(io.StringIO(data, newline="\n"))
    ends = {0}
    lines = data.splitlines(keepends=True) if "\r" not in data.replace("\r\n", "") else []
    for _ in reader:
        ends.add(sum(map(len, lines[: reader.line_num])))
    scanner, encoded = RecordScanner(","), data.encode()
    for start in range(0, len(encoded), size):
        first, last = scanner.scan(encoded[start : start + size], wants_first=True)
        assert (first > 0) == (last > 0)
        assert {start + cut for cut in (first, last) if cut} <= ends
    if not scanner.is_inside:
        assert RecordScanner(",").scan(encoded, wants_first=False)[1] == max(
            (end for end in ends if data[:end].endswith("\n")), default=0
        )


def test_records_are_named_with_their_first_line(tmp_path: Path):
    data = 'id,text\n1,"a\nb"\n2\n3,"c""d"\n4,"x"y\n5,\xff\n6,e\n'.encode("latin1")
    path = write_bytes(tmp_path / "x.csv", data)
    for size in (1, 9, 1 << 20):
        with pytest.raises(DataError, match="x.csv:4: a record of 1 fields, expected 2"):
            texts_of(path, chunk_bytes=size)
        texts, rejects, replaced = rejects_of(path, chunk_bytes=size, on_error="skip")
        assert texts == ["a\nb", 'c"d', "e"]
        assert replaced == 0
        assert rejects == [("ragged_record", 4), ("broken_record", 6), ("not_utf8", 7)]
        assert rejects_of(path, chunk_bytes=size, on_error="replace")[::2] == (["a\nb", 'c"d', "\ufffd", "e"], 1)
    with pytest.raises(DataError, match=r"y.csv:3: byte 16 \(0xe9\) is not UTF-8"):
        texts_of(write_bytes(tmp_path / "y.csv", b"id,text\n1,a\n2,ab\xe9c\n"))
    with pytest.raises(DataError, match=r"z.csv:2: .*quotes inside a field are written twice, not with a backslash"):
        texts_of(write_bytes(tmp_path / "z.csv", b'id,text\n1,"a \\"b\\" c"\n'))


def test_quotes_that_never_close(tmp_path: Path):
    path = write_bytes(tmp_path / "x.csv", b'text\na\n"b\nc\nd\n')
    lost = r"x.csv:3: broken record: a quote that opens at line 3 is never closed: lines 3 to 5 \(7 bytes\) are lost"
    with pytest.raises(DataError, match=lost):
        texts_of(path, chunk_bytes=2)
    assert rejects_of(path, on_error="skip", chunk_bytes=2)[:2] == (["a"], [("broken_record", 3)])
    with pytest.raises(DataError, match="x.csv:3: a record of more than 4 bytes"):
        texts_of(path, chunk_bytes=2, max_document_bytes=4)
    assert texts_of(path, quoting="none") == ["a", '"b', "c", "d"]


@pytest.mark.parametrize("size", [7, 1 << 20])
@pytest.mark.parametrize("line", [b'2,"a stray', b'2,"a stray\r'])
def test_a_stray_quote_costs_its_own_line(tmp_path: Path, size: int, line: bytes):
    """The quotes that follow may close it, or none does."""
    records = [b"%d,plain" % number for number in range(3, 9)]
    for others in (records, [*records[:2], b'8,"of its own"', *records[2:]]):
        path = write_bytes(tmp_path / "x.csv", b"\n".join([b"id,text", b"1,a", line, *others]) + b"\n")
        texts, rejects, _ = rejects_of(path, on_error="skip", chunk_bytes=size)
        assert (len(texts), rejects) == (1 + len(others), [("broken_record", 3)])
        with pytest.raises(
            DataError, match=r"x.csv:3: broken record: a quote that opens at line 3 is (never|not) closed"
        ):
            texts_of(path, chunk_bytes=size)
    reject = [r for chunk in read_chunks(expand_inputs([path])) for r in parse_chunk(chunk, SKIP).rejects][0]
    assert reject.excerpt == '2,"a stray'


def test_a_record_too_long_says_what_is_lost_with_it(tmp_path: Path):
    path = write_bytes(tmp_path / "x.csv", b'text\na\n"b\n' + b"c\n" * 100)
    (reject,) = [
        reject
        for chunk in read_chunks(expand_inputs([path]), replace(SKIP, chunk_bytes=10, max_document_bytes=20))
        for reject in parse_chunk(chunk, SKIP).rejects
    ]
    assert (reject.reason, reject.line) == ("too_many_bytes", 3)
    assert reject.message.startswith("lines 3 to 103 (203 bytes) are lost: a record of more than 20 bytes")


@pytest.mark.parametrize("size", [1, 5, 1 << 20])
@pytest.mark.parametrize(
    ("name", "data", "texts"),
    [
        ("x.csv", b'id,text\r1,a\r2,"b\nc"\r', ["a", "b\nc"]),
        ("x.csv", b'"i\rd",text\r1,a\r2,b', ["a", "b"]),
        ("x.tsv", b"id\ttext\r1\ta\r", ["a"]),
        ("x.csv", b"\n\r\nid,text\n1,a\n", ["a"]),
        ("x.csv", b"id,text\n1," + b"x" * 200_000 + b"\n", ["x" * 200_000]),
    ],
    ids=["carriage returns", "in quotes", "tsv", "blank lines first", "long field"],
)
def test_unusual_but_sound_files(tmp_path: Path, name: str, data: bytes, texts: list[str], size: int):
    path = write_bytes(tmp_path / name, data)
    if size > 1 or len(data) < 1000:
        assert texts_of(path, chunk_bytes=size) == texts


def test_a_first_record_of_many_characters(tmp_path: Path):
    path = write_bytes(tmp_path / "x.csv", b"1," + b"x" * 200_000 + b"\n2,y\n")
    assert [len(text) for text in texts_of(path, has_header=False, json_key="2")] == [200_000, 1]
    found = rejects_of(path, has_header=False, json_key="2", on_error="skip", max_document_bytes=1000)
    assert found == (["y"], [("too_many_bytes", 1)], 0)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"text,text\n1,a\n", "x.csv: 2 columns are named 'text'; rename one"),
        (b"id;text\n1;a\n", "the columns are: id;text; .* if they are separated by ';': --delimiter ';'"),
        (b"sep=;\nid;text\n", "remove the line sep= that Excel wrote"),
        (b"id, text\n1,a\n", "the columns are: id, ' text'"),
        (b'"id,text\n1,a\n', "a quote that opens in the header is not closed"),
    ],
)
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_headers_without_the_column(tmp_path: Path, data: bytes, words: str, on_error: str):
    path = write_bytes(tmp_path / "x.csv", data)
    with pytest.raises(DataError, match=words):
        expand_inputs([path], ReadOptions(on_error=on_error))  # before any work
    if b";" in data and b"sep" not in data:
        assert texts_of(path, delimiter=";") == ["a"]


def test_columns_are_checked_at_once(tmp_path: Path):
    path = write_bytes(tmp_path / "x.csv", b"id,body\n1,a\n2,b\n")
    for on_error in ("stop", "skip"):
        with pytest.raises(DataError, match="x.csv: no column 'text'; the columns are: id, body; .*--json-key"):
            texts_of(path, on_error=on_error)
        with pytest.raises(DataError, match="no column 3: its first record has 2"):
            texts_of(path, on_error=on_error, has_header=False, json_key="3")
    assert texts_of(path, has_header=False, json_key="2") == ["body", "a", "b"]
    with pytest.raises(ConfigError, match="give --json-key the number"):
        texts_of(path, has_header=False)


def test_tsv_has_no_quoting(tmp_path: Path):
    path = write_bytes(tmp_path / "x.tsv", '\ufeffid\ttext\n1\tsay "a\n2\t"b" c\r\n\n3\t\n'.encode())
    assert texts_of(path, chunk_bytes=3) == ['say "a', '"b" c', ""]


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared corpora; set TACO_SHARED_DATA")
def test_glue_files_have_the_official_counts():
    assert len(texts_of(SHARED / "glue" / "MRPC" / "train.tsv", json_key="#1 String")) == 3668
    assert len(texts_of(SHARED / "glue" / "SST-2" / "train.tsv", json_key="sentence")) == 67349
    assert len(texts_of(SHARED / "glue" / "CoLA" / "train.tsv", json_key="4", has_header=False)) == 8551
