"""Patterns, folders, lists and standard input; everything that is wrong with inputs is said at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from corpora import write_bytes, write_jsonl, write_vocab
from project import ROOT
from read_texts import texts_of

from data_tools.encoding.encode import EncodeOptions
from data_tools.preprocess import preprocess
from data_tools.readers import ReadOptions, Source, expand_inputs, read_chunks
from pretrain.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in" / "deep" / "er").mkdir(parents=True)
    (tmp_path / "in" / ".git").mkdir()
    for name in ("b.jsonl", "a.jsonl.gz", "deep/er/c.jsonl.zst", ".git/d.jsonl", ".hidden.jsonl"):
        write_jsonl(tmp_path / "in" / name, [name])
    (tmp_path / "in" / "README.md").write_text("about")
    return tmp_path / "in"


def test_folders_and_patterns_are_sorted(folder: Path):
    notes: list[str] = []
    names = [Path(source.path).name for source in expand_inputs([folder], note=notes.append)]
    assert names == ["a.jsonl.gz", "b.jsonl", "c.jsonl.zst"]
    assert notes == [
        f"{folder}: left out 1 file of unknown kind: README.md",
        f"{folder}: left out 2 hidden files and folders: .git, .hidden.jsonl",
    ]
    assert texts_of(folder / "**" / "*.jsonl*") == ["a.jsonl.gz", "b.jsonl", "deep/er/c.jsonl.zst"]
    assert texts_of(folder / "deep", folder / "b.jsonl") == ["deep/er/c.jsonl.zst", "b.jsonl"]


def test_lists_of_files(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    (folder / "files.txt").write_text("# what to read\nb.jsonl\n\n  a.*  \n")
    assert texts_of("@files.txt") == ["b.jsonl", "a.jsonl.gz"]
    odd = os.fsdecode(b"\xff \xc2\x85.jsonl")  # Latin-1, and a line end only for Python's str
    (folder / "b.jsonl").rename(odd)
    (folder / "files.txt").write_bytes(b"\xef\xbb\xbf" + os.fsencode(odd) + b"\r\n#x\r\n")
    assert texts_of("@files.txt") == ["b.jsonl"]
    (folder / odd).rename("b.jsonl")
    (folder / "files.txt").write_bytes(b"b.jsonl\0a.jsonl\0")
    with pytest.raises(DataError, match="@files.txt: holds zero bytes"):
        expand_inputs(["@files.txt"])
    (folder / "files.txt").write_text("gone.jsonl\nb.jsonl\n")
    with pytest.raises(DataError, match="^gone.jsonl: No such file"):
        expand_inputs(["@files.txt"])
    with pytest.raises(DataError, match="@nothing.txt: cannot be read"):
        expand_inputs(["@nothing.txt"])


def test_all_problems_at_once(folder: Path):
    (folder / "none").mkdir()
    inputs = [
        folder / "x.jsonl",
        folder / "README.md",
        folder / "none",
        folder / "*.csv",
        "-",
        "hf://",
    ]
    with pytest.raises(DataError) as caught:
        expand_inputs(inputs)
    for words in (
        "x.jsonl: No such",
        "README.md: unknown kind",
        "none: holds no file",
        "no file matches",
        "-: standard input has no name",
        "expected hf://NAME",
    ):
        assert words in str(caught.value)


def names_of(*inputs: Path | str, notes: list[str] | None = None, tokenizer: Path | None = None) -> list[str]:
    """The names of the sources, inside the folder or pattern."""
    own = str(tokenizer) if tokenizer else None
    found = expand_inputs(inputs, tokenizer=own, note=[].append if notes is None else notes.append)
    return [source.name for source in found]


def test_links_are_followed_once(folder: Path):
    (folder / "circle").symlink_to("..")
    (folder / "more").symlink_to(folder / "deep")
    (folder.parent / "store").mkdir()
    write_jsonl(folder.parent / "store" / "s.jsonl", ["s"])
    (folder / "store").symlink_to("../store")
    notes: list[str] = []
    plain = ["a.jsonl.gz", "b.jsonl"]
    assert names_of(folder, notes=notes) == [*plain, "circle/store/s.jsonl", "deep/er/c.jsonl.zst"]
    assert "circle/in is " in notes[-1]
    assert "more is " in notes[-1]
    pattern = names_of(folder / "**" / "*.jsonl*", notes=notes)
    assert sorted(pattern) == [*plain, "circle/store/s.jsonl", "deep/er/c.jsonl.zst"]
    (folder / "circle").unlink()
    assert names_of(folder / "*" / "*.jsonl") == ["store/s.jsonl"]
    assert names_of(folder / "more" / "**") == ["er/c.jsonl.zst"]


def test_one_file_by_many_names_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    os.link("b.jsonl", "hard.jsonl")
    (folder / "soft.jsonl").symlink_to("b.jsonl")
    notes: list[str] = []
    assert names_of("b.jsonl", "b.jsonl", "./b.jsonl", ".", notes=notes) == [
        "b.jsonl",
        "a.jsonl.gz",
        "deep/er/c.jsonl.zst",
    ]
    assert notes[-1].startswith("b.jsonl is named 6 times (also as ./b.jsonl, ")


def test_what_cannot_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch):
    (folder / "gone.jsonl").symlink_to("nowhere")
    (folder / "gone").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.jsonl")
    with pytest.raises(DataError, match=r"gone: is a broken link to nowhere.*gone.jsonl: is a broken link to nowhere"):
        expand_inputs([folder])
    with pytest.raises(DataError, match=r"gone.jsonl: is a broken link"):
        expand_inputs([folder / "*.jsonl"])
    with pytest.raises(DataError, match=r"gone.jsonl: is a broken link") as caught:
        expand_inputs([folder / "**" / "*.jsonl", folder])
    assert str(caught.value).count("gone.jsonl: ") == 1
    with pytest.raises(DataError, match=r"gone: is a broken link"):
        expand_inputs([folder / "*o*" / "*.jsonl"])
    for name in ("gone", "gone.jsonl"):
        (folder / name).unlink()
    notes: list[str] = []
    assert len(names_of(folder, notes=notes)) == 3
    assert f"{folder}: left out 1 pipe, socket or device: pipe.jsonl" in notes
    scandir, closed = os.scandir, str(folder / "deep" / "er")

    def refuse(path: str) -> object:
        if str(path) == closed:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may open everything
    for given in (folder, folder / "deep" / "**", folder / "deep" / "*" / "*.zst"):
        with pytest.raises(DataError, match=f"{closed}: cannot be read: Permission denied"):
            expand_inputs([given])


def test_products_of_our_own_are_no_text(folder: Path, tmp_path: Path):
    vocab = write_vocab(folder)
    options = EncodeOptions(str(vocab), reading=ReadOptions(on_error="skip"))
    (folder / "bad.jsonl").write_text("no JSON\n")
    preprocess([str(folder)], options, str(folder / "out"))
    (folder / "vocab2.txt").write_bytes(vocab.read_bytes())
    (folder / "plain.txt").write_text("[PAD] [UNK] [CLS] [SEP] [MASK] are the special tokens of BERT.\n")
    (folder / "link.txt").symlink_to("plain.txt")
    notes: list[str] = []
    kept = ["a.jsonl.gz", "b.jsonl", "bad.jsonl", "link.txt", "deep/er/c.jsonl.zst"]
    assert names_of(folder, notes=notes, tokenizer=folder / "plain.txt") == [
        name for name in kept if name != "link.txt"
    ]  # whatever its content, the run's own tokenizer is no text
    assert names_of(folder, notes=notes) == kept
    (line,) = [note for note in notes if "not meant as text" in note][1:]
    for words in (
        "out.json (the manifest",
        "out.rejects.jsonl (the rejects",
        "out.tokenizer (a tok",
        "vocab.txt (a voc",
    ):
        assert words in line
    with pytest.raises(
        DataError, match=r"out.json: is the manifest of a dataset, not text.*vocab.txt: is the tokenizer"
    ):
        expand_inputs([folder / "out.json", vocab], tokenizer=str(vocab))
    assert names_of(folder / "**", notes=notes) == sorted(kept)
    with pytest.raises(DataError, match=r"out.tokenizer: is a tokenizer, not text"):
        expand_inputs([folder / "out.tokenizer"])
    everything = expand_inputs([folder], ReadOptions(input_format="txt"), note=notes.append)
    assert {source.name for source in everything} == {*kept, "README.md"}


@pytest.mark.parametrize(
    "name", ["x.jsonl", "x.txt.gz", "x.csv.zst", "x.wet.xz", "x.parquet", "x.arrow", "x.tsv", "y.txt"]
)
def test_empty_files_of_every_kind_are_counted(tmp_path: Path, name: str):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, table = tmp_path / name, pa.table({"text": pa.array([], pa.string())})
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".arrow":
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    else:
        content = {"x.csv.zst": b"id,text\n", "x.tsv": b"text", "y.txt": b"\xef\xbb\xbf"}.get(name, b"")
        write_bytes(path, content)
    (tmp_path / name.replace(path.name[0], "zero", 1)).touch()
    with pytest.raises(DataError, match="all 2 files are empty"):
        expand_inputs([tmp_path])
    write_jsonl(tmp_path / "good.jsonl", ["a"])
    notes: list[str] = []
    assert names_of(tmp_path, notes=notes) == ["good.jsonl"]
    assert notes[-1].startswith(f"2 of 3 files are empty and hold no document: {path}")


def test_what_stands_beside_a_saved_dataset_is_named(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / "more").mkdir()
    for name in ("extra.jsonl", "more/extra2.jsonl"):
        write_jsonl(tmp_path / "saved" / name, ["b"])
    for given in (tmp_path / "saved", tmp_path):
        notes: list[str] = []
        assert len(names_of(given, notes=notes)) == 1
        assert notes == [
            f"{tmp_path / 'saved'}: is a saved dataset; left out 2 other files: extra.jsonl, more/extra2.jsonl"
        ]


def test_format_overrides_the_name(tmp_path: Path):
    path = write_bytes(tmp_path / "data", b"text\na\n")
    assert texts_of(path, input_format="csv") == ["a"]
    assert texts_of(path, input_format="txt", text_documents="line") == ["text", "a"]
    packed = write_bytes(tmp_path / "x.gz", b"text\na\n").rename(tmp_path / "packed")
    assert texts_of(packed, input_format="csv.gz") == ["a"]
    assert texts_of(write_bytes(tmp_path / "y.json.zst", b"a\tb\n"), input_format="txt") == ["a\tb"]


def test_identity_tells_a_changed_file(tmp_path: Path):
    path = write_jsonl(tmp_path / "x.jsonl", ["a"])
    before = expand_inputs([path])[0]
    assert before.identity == (str(path), path.stat().st_size, path.stat().st_mtime_ns)
    write_jsonl(path, ["ab"])
    assert expand_inputs([path])[0].identity != before.identity


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_standard_input(tmp_path: Path, compression: str):
    path = write_jsonl(tmp_path / f"x.jsonl{compression}", ["a", "b" * 100_000, "c"])
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from read_texts import texts_of; "
        "print(len(texts_of('-', input_format=sys.argv[2], chunk_bytes=1000)))"
    )
    command = [sys.executable, "-c", program, str(ROOT / "tests" / "helpers"), f"jsonl{compression}"]
    with path.open("rb") as file:
        done = subprocess.run(command, stdin=file, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "3\n"
    sending = subprocess.Popen(["cat", str(path)], stdout=subprocess.PIPE)
    done = subprocess.run(command, stdin=sending.stdout, capture_output=True, text=True, cwd=ROOT, check=True)
    assert (done.stdout, sending.wait()) == ("3\n", 0)


def test_standard_input_is_neither_divided_nor_resumed():
    options = ReadOptions(input_format="jsonl")
    sources = expand_inputs(["-"], options)
    assert sources == [Source("-", "jsonl")]
    for how in ({"shard": (0, 2)}, {"start": (0, 1)}):
        with pytest.raises(ConfigError, match="standard input cannot be divided or resumed"):
            list(read_chunks(sources, options, **how))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="--input-format parquet cannot be read from standard input"):
        expand_inputs(["-"], ReadOptions(input_format="parquet"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("user/corpus", "for a dataset of the Hugging Face hub give hf://user/corpus$"),
        ("corpus", "for a dataset of the Hugging Face hub give hf://corpus$"),
        ("https://huggingface.co/datasets/user/corpus", "give hf://user/corpus$"),
        ("https://example.org/x.jsonl", "it is an address, not a file: fetch it first"),
        ("~/x.jsonl", "the shell replaces ~"),
        ("x{1..3}.jsonl", "the shell replaces braces only outside quotes"),
        ("here/x", "here/x: No such file or directory$"),
        ("a[1]/*.jsonl", r"no file matches; its folder has brackets in its name, so write a\[\[\]1\]/\*\.jsonl$"),
    ],
)
def test_names_that_are_no_files_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str):
    monkeypatch.chdir(tmp_path)
    Path("a[1]").mkdir()
    Path("here").mkdir()
    write_jsonl(Path("a[1]") / "x[2].jsonl", ["a"])
    with pytest.raises(DataError, match=words):
        expand_inputs([name])
    assert texts_of("a[[]1]/*.jsonl") == texts_of("a[1]") == texts_of("a[1]/x[2].jsonl") == ["a"]
