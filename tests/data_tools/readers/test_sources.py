"""Patterns, folders, lists and standard input; everything that is wrong with inputs is said at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from corpora import write_bytes, write_jsonl
from project import ROOT
from read_texts import texts_of

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
    assert notes == [f"{folder}: left out 1 files of unknown kind: README.md"]
    assert texts_of(folder / "**" / "*.jsonl*") == ["a.jsonl.gz", "b.jsonl", "deep/er/c.jsonl.zst"]
    assert texts_of(folder / "deep", folder / "b.jsonl") == ["deep/er/c.jsonl.zst", "b.jsonl"]


def test_lists_of_files(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    (folder / "files.txt").write_text("# what to read\nb.jsonl\n\n  a.*  \n")
    assert texts_of("@files.txt") == ["b.jsonl", "a.jsonl.gz"]
    (folder / "files.txt").write_text("gone.jsonl\nb.jsonl\n")
    with pytest.raises(DataError, match="^gone.jsonl: No such file"):
        expand_inputs(["@files.txt"])
    with pytest.raises(DataError, match="@nothing.txt: cannot be read"):
        expand_inputs(["@nothing.txt"])


def test_all_problems_at_once(folder: Path):
    (folder / "empty.jsonl").touch()
    (folder / "none").mkdir()
    inputs = [
        folder / "x.jsonl",
        folder / "empty.jsonl",
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
        "empty.jsonl: is empty",
        "README.md: unknown kind",
        "none: holds no file",
        "no file matches",
        "-: standard input has no name",
        "expected hf://NAME",
    ):
        assert words in str(caught.value)


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
