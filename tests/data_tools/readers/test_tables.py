"""Parquet, arrow and saved Hugging Face datasets give their rows in order, and faults as the other formats do."""

from __future__ import annotations

import random
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from read_texts import cut_in_shards, rejects_of, texts_of

from data_tools.readers import ReadOptions, expand_inputs, parse_chunk
from pretrain.errors import DataError

TEXTS = [f"{number} café 中文 " * (1 + number % 7) for number in range(500)]


def table(texts: list[object] | None = None, kind: pa.DataType | None = None) -> pa.Table:
    texts = TEXTS if texts is None else texts
    return pa.table({"id": list(range(len(texts))), "text": pa.array(texts, kind or pa.string())})


def write_arrow(path: Path, content: pa.Table, rows: int = 64, *, is_file: bool = False, **options: object) -> Path:
    write = pa.ipc.new_file if is_file else pa.ipc.new_stream
    with write(path, content.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(content, max_chunksize=rows)
    return path


def write(path: Path, kind: str, content: pa.Table, rows: int = 64) -> Path:
    if kind == "parquet":
        pq.write_table(content, path, row_group_size=rows)
        return path
    return write_arrow(path, content, rows, is_file=kind == "file")


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=60),
    rows=st.integers(1, 40),
    size=st.integers(1, 300),
    num_shards=st.integers(1, 5),
)
@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_any_cut_gives_all_rows(texts, rows, size, num_shards, kind, tmp_path_factory):  # noqa: ANN001
    folder = tmp_path_factory.mktemp("tables")
    suffix = "parquet" if kind == "parquet" else "arrow"
    paths = [write(folder / f"{number}.{suffix}", kind, table(texts), rows) for number in range(2)]
    assert texts_of(*paths, chunk_bytes=size) == texts * 2
    options = ReadOptions(chunk_bytes=size)
    whole, _ = cut_in_shards(expand_inputs(paths, options), options, num_shards)
    # Workers get chunks in any order.
    mixed = {place: parse_chunk(whole[place], options).texts for place in reversed(range(len(whole)))}
    assert [text for place in range(len(whole)) for text in mixed[place]] == texts * 2


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_compressed_arrow_and_string_types(tmp_path: Path, compression: str):
    for number, kind in enumerate([pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]):
        for is_file in (True, False):
            path = tmp_path / f"{number}{is_file}.arrow"
            write_arrow(path, table(kind=kind), 100, is_file=is_file, compression=compression)
            assert texts_of(path, chunk_bytes=999) == TEXTS
        pq.write_table(table(kind=kind), tmp_path / f"{number}.parquet", compression=compression)
        assert texts_of(tmp_path / f"{number}.parquet", chunk_bytes=999) == TEXTS


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
@pytest.mark.parametrize("name", ["string_view", "binary_view", "dictionary"])
def test_views_as_polars_writes_them(tmp_path: Path, kind: str, name: str):
    texts = [*TEXTS, None, "a long text beyond the twelve bytes of a view"]
    if name == "dictionary":
        if kind == "parquet":
            pytest.skip("Parquet stores no dictionaries of views")
        views = pa.array(TEXTS, pa.string_view())
        column = pa.DictionaryArray.from_arrays(pa.array([*range(len(TEXTS)), None, 1], pa.uint32()), views)
        texts[-1] = TEXTS[1]
    else:
        column = pa.array(texts).cast(pa.binary()).cast(pa.string_view()).cast(getattr(pa, name)())
    path = write(tmp_path / f"x.{'parquet' if kind == 'parquet' else 'arrow'}", kind, pa.table({"text": column}))
    found, rejects, _ = rejects_of(path, on_error="skip", chunk_bytes=999)
    assert found == [text for text in texts if text is not None]
    assert rejects == [("not_a_string", len(TEXTS) + 1)]


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_tables_that_are_not_read_are_said_before_any_work(tmp_path: Path, kind: str, on_error: str):
    suffix, other = ("parquet", "arrow") if kind == "parquet" else ("arrow", "parquet")
    path, options = tmp_path / f"x.{suffix}", ReadOptions(on_error=on_error)
    twice = pa.table([["a"], ["b"]], names=["text", "text"])
    for content, words in [
        (twice, "2 columns are named 'text'; rename one"),
        (pa.table({"text": [["a"], ["b"]]}), "expected strings, found list<.*--json-key"),
        (pa.table({"text": [{"body": "a"}]}), "choose one of its fields with --json-key, such as text.body"),
    ]:
        with pytest.raises(DataError, match=rf"x.{suffix}: .*{words}"):
            expand_inputs([write(path, kind, content)], options)
    assert texts_of(write(path, kind, twice.rename_columns(["id", "id"]).append_column("text", [["c"]]))) == ["c"]
    path = write(tmp_path / f"y.{other}", kind, table(["a"]))
    with pytest.raises(DataError, match=rf"y.{other}: is not .*; say so with --input-format {suffix} "):
        expand_inputs([path], options)
    assert texts_of(path, input_format=suffix) == ["a"]


@pytest.mark.parametrize("kind", ["parquet", "stream"])
def test_columns_inside_structs(tmp_path: Path, kind: str):
    rows = [{"a": {"b": "x", "c": 1}}, {"a": None}, {"a": {"b": "y", "c": 2}}]
    content = (
        pa.table({"row": pa.array(rows), "row.a.b": ["1", "2", "3"]})
        if kind == "literal"
        else pa.table({"row": pa.array(rows)})
    )
    path = write(tmp_path / f"x.{'parquet' if kind == 'parquet' else 'arrow'}", kind, content)
    assert rejects_of(path, json_key="row.a.b", on_error="skip") == (["x", "y"], [("not_a_string", 2)], 0)
    with pytest.raises(DataError, match="row 2: expected a string, found null"):
        texts_of(path, json_key="row.a.b")
    with pytest.raises(DataError, match="no column 'row.a.d'; the columns are: row.a.b, row.a.c"):
        texts_of(path, json_key="row.a.d")
    with pytest.raises(DataError, match="expected strings, found int64"):
        texts_of(path, json_key="row.a.c")
    with pytest.raises(DataError, match="expected strings, found struct"):
        texts_of(path, json_key="row.a")


def test_missing_columns_are_named_before_any_work(tmp_path: Path):
    good = write(tmp_path / "a.parquet", "parquet", table())
    bad = [write(tmp_path / "b.parquet", "parquet", pa.table({"id": [1]}))]
    bad.append(write(tmp_path / "c.arrow", "stream", pa.table({"body": ["x"]})))
    for on_error in ("stop", "skip"):
        with pytest.raises(DataError) as caught:
            expand_inputs([good, *bad], ReadOptions(on_error=on_error))  # type: ignore[arg-type]
        assert "b.parquet: no column 'text'; the columns are: id;" in str(caught.value)
        assert "c.arrow: no column 'text'; the columns are: body;" in str(caught.value)


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_faulty_values(tmp_path: Path, kind: str):
    path = tmp_path / ("x.parquet" if kind == "parquet" else "x.arrow")
    write(path, kind, table([b"a", None, b"b\xff", b"c" * 50, b"d"], pa.binary()), 2)
    reasons = [("not_a_string", 2), ("not_utf8", 3), ("too_many_bytes", 4)]
    assert rejects_of(path, on_error="skip", max_document_bytes=40) == (["a", "d"], reasons, 0)
    mended = (["a", "b\ufffd", "d"], [reasons[0], reasons[2]], 1)
    assert rejects_of(path, on_error="replace", max_document_bytes=40) == mended
    with pytest.raises(DataError, match=rf"{path.name}: row 2: expected a string, found null"):
        texts_of(path)


@pytest.mark.parametrize("column", ["string", "large_string", "view", "dictionary", "struct"])
@pytest.mark.parametrize("kind", ["parquet", "stream"])
def test_strings_that_are_not_utf8_are_faults_of_their_rows(tmp_path: Path, kind: str, column: str):
    if (kind, column) == ("parquet", "dictionary"):
        pytest.skip("pyarrow reads no such dictionary from Parquet")
    raw = pa.array([b"a", b"caf\xe9", None, b"d" * 20])  # as writers that do not check what they are given leave them
    wide, view = raw.cast(pa.large_binary()), raw.cast(pa.binary_view())
    text = {"large_string": wide.view(pa.large_string()), "view": view.view(pa.string_view())}.get(
        column, raw.view(pa.string())
    )
    if column == "dictionary":
        text = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 2]), text.filter(text.is_valid()))
    if column == "struct":
        text = pa.StructArray.from_arrays([text], ["b"])
    path = tmp_path / ("x.parquet" if kind == "parquet" else "x.arrow")
    write(path, kind, pa.table({"text": text}), 10)
    options = {"json_key": "text.b"} if column == "struct" else {}
    expected = (["a", "d" * 20], [("not_utf8", 2), ("not_a_string", 3)], 0)
    assert rejects_of(path, on_error="skip", **options) == expected
    with pytest.raises(DataError, match=r"row 2: byte 3 of the text \(0xe9\) is not UTF-8"):
        texts_of(path, **options)


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_truncated_and_damaged_files_are_named(tmp_path: Path, kind: str):
    path = tmp_path / ("x.parquet" if kind == "parquet" else "x.arrow")
    data = write(path, kind, table(), 100).read_bytes()
    for size in (1, 7, len(data) // 2, len(data) - 9, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(DataError, match=f"{path.name}: .*truncated"):
            texts_of(path)
        texts, rejects, _ = rejects_of(path, on_error="skip")
        assert [reason for reason, _ in rejects] == ["damaged_file"]
        assert texts == TEXTS[: len(texts)]
    path.write_bytes(b"PAR1 this is none of them, whatever its name says PAR1")
    with pytest.raises(DataError, match=f"{path.name}: "):
        texts_of(path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_flipped_bytes_are_errors_or_other_text(tmp_path: Path, kind: str):
    """Neither format has checksums, so a flip may change a text; it never ends the process or loses rows unsaid."""
    texts, generator = TEXTS[:60], random.Random(7)
    path = tmp_path / ("x.parquet" if kind == "parquet" else "x.arrow")
    data = write(path, kind, table(texts), 25).read_bytes()
    outcomes = set()
    for _ in range(300):
        flipped = bytearray(data)
        near_end = len(data) - 1 - generator.randrange(min(2500, len(data)))
        place = generator.choice([generator.randrange(1200), near_end, generator.randrange(len(data))])
        flipped[place] = generator.choice([0, 255, generator.randrange(256), flipped[place] ^ 1])
        path.write_bytes(flipped)
        try:
            found, rejects, _ = rejects_of(path, on_error="skip", chunk_bytes=generator.choice([100, 1000, 1 << 22]))
        except DataError as error:
            outcomes.add(path.name in str(error))
        else:
            outcomes.add(bool(rejects) or len(found) == len(texts))
    assert outcomes == {True}


def test_saved_datasets_and_their_splits(tmp_path: Path):
    whole = datasets.Dataset.from_dict({"text": TEXTS})
    whole.save_to_disk(tmp_path / "one", num_shards=3)
    datasets.DatasetDict({"train": whole, "test": whole.select(range(5))}).save_to_disk(tmp_path / "more")
    notes: list[str] = []
    assert texts_of(tmp_path / "one") == TEXTS
    assert texts_of(tmp_path / "more" / "test") == TEXTS[:5]
    assert len(expand_inputs([tmp_path / "more"], note=notes.append)) == 2
    assert "reads all splits, train, test" in notes[0]
    assert texts_of(tmp_path / "more") == TEXTS + TEXTS[:5]
    assert texts_of(tmp_path) == TEXTS + TEXTS[:5] + TEXTS or texts_of(tmp_path)
    (tmp_path / "one" / "state.json").write_text('{"_data_files": [{"filename": "../../x"}]}')
    with pytest.raises(DataError, match="state.json: names files outside"):
        expand_inputs([tmp_path / "one"])
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match="state.json: damaged"):
        expand_inputs([tmp_path / "one"])


class FakeHub:
    """Stands for the hub: rows by name, configuration and split; anything else cannot be reached."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **rows: list[dict[str, object]]) -> None:
        self.rows = rows
        monkeypatch.setattr(datasets, "load_dataset", self.load)

    def load(self, name: str, configuration: str | None, *, split: str, streaming: bool) -> list[dict[str, object]]:
        assert streaming
        if name not in self.rows:
            raise ConnectionError("no route to host")
        return [{**row, "from": f"{configuration}/{split}"} for row in self.rows[name]]


def test_hub_names(monkeypatch: pytest.MonkeyPatch):
    FakeHub(monkeypatch, wiki=[{"text": text} for text in TEXTS], bad=[{"text": "a"}, {"text": None}])
    assert texts_of("hf://wiki") == texts_of("hf://wiki:20231101.en:train", chunk_bytes=100) == TEXTS
    assert set(texts_of("hf://wiki", json_key="from")) == {"None/train"}
    assert set(texts_of("hf://wiki:de:test", json_key="from")) == {"de/test"}
    assert rejects_of("hf://bad", on_error="skip") == (["a"], [("not_a_string", 2)], 0)
    with pytest.raises(DataError, match=r"hf://bad: no column 'body'; the columns are: text, from"):
        texts_of("hf://bad", json_key="body")
    with pytest.raises(DataError, match=r"hf://gone: .*no route to host.*save_to_disk"):
        texts_of("hf://gone")
    with pytest.raises(DataError, match="expected hf://NAME"):
        texts_of("hf://a:b:c:d")


def test_a_stream_without_end_mark_keeps_its_rows_as_advised(tmp_path: Path):
    path = write_arrow(tmp_path / "x.arrow", table(["a", "b"]))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"x.arrow: its arrow stream has no end mark: .* --on-error skip$"):
        texts_of(path)
    assert rejects_of(path, on_error="skip") == (["a", "b"], [("damaged_file", None)], 0)
