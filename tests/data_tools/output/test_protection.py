"""Files that a data program did not make are never replaced or removed, and no output is one of the inputs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from corpora import TEXTS, run_program, write_jsonl, write_vocab

from data_tools.encoding.encode import EncodeOptions
from data_tools.merge import merge
from data_tools.own_files import is_journal, is_lock, is_manifest, is_rejects, product_at
from data_tools.preprocess import preprocess
from data_tools.readers import ReadOptions
from pretrain.data.dataset.verification import verify
from pretrain.errors import ConfigError, DataError

SUFFIXES = ("json", "idx", "bin", "rejects.jsonl", "lock", "journal")
UNFINISHED = ("bin.tmp", "raw.documents.tmp", "rejects.jsonl.tmp")


def run(folder: Path, *inputs: Path | str, output: str = "out", tokenizer: Path | None = None, **values: Any) -> None:
    vocab = tokenizer or write_vocab(folder)
    options = EncodeOptions(str(vocab), reading=ReadOptions(on_error="skip", chunk_bytes=64))
    preprocess([*map(str, inputs)], options, str(folder / output), **values)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_vocab(tmp_path)
    return write_jsonl(tmp_path / "x.jsonl", TEXTS)


@pytest.mark.parametrize("suffix", [*SUFFIXES, *UNFINISHED])
def test_files_of_others_stay(tmp_path: Path, corpus: Path, suffix: str) -> None:
    run(tmp_path, corpus, output="part")
    write_jsonl(tmp_path / f"out.{suffix}", ["mine"])
    before = files(tmp_path)
    for more in ({}, {"overwrite": True}, {"restart": True}):
        with pytest.raises(DataError, match=rf"out.{suffix}: is in the way and not of our making"):
            run(tmp_path, corpus, **more)
    with pytest.raises(DataError, match=rf"out.{suffix}: is in the way and not of our making"):
        merge(str(tmp_path / "out"), [str(tmp_path / "part")], overwrite=True)
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", ["out.tokenizer", "out.tokenizer.tmp", "out.tokenizer.old"])
def test_folders_of_others_stay(tmp_path: Path, corpus: Path, name: str) -> None:
    run(tmp_path, corpus)
    if name != "out.tokenizer":
        (tmp_path / name).mkdir()
    (tmp_path / name / "notes.md").write_text("mine")
    before = files(tmp_path)
    with pytest.raises(DataError, match=rf"{name}.*: is in the way and not of our making"):
        run(tmp_path, corpus, overwrite=True)
    assert files(tmp_path) == before
    (tmp_path / name / "notes.md").unlink()
    if name != "out.tokenizer":
        (tmp_path / name).rmdir()
    run(tmp_path, corpus, overwrite=True)
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize("link", [os.link, os.symlink, shutil.copy])
@pytest.mark.parametrize("suffix", ["json", "rejects.jsonl", "lock", "bin"])
def test_no_output_is_an_input(tmp_path: Path, corpus: Path, suffix: str, link: Any) -> None:
    taken = tmp_path / f"out.{suffix}"
    link(corpus, taken)
    source = taken if link is shutil.copy else corpus
    (tmp_path / "list.txt").write_text(f"{source}\n")
    before = files(tmp_path)
    if suffix in ("lock", "bin") and link is shutil.copy:
        return  # of unknown kind, so no input
    for given in (source, f"@{tmp_path / 'list.txt'}"):
        with pytest.raises(
            DataError, match=rf"out.{suffix}: is an input, and would be replaced; choose another output"
        ):
            run(tmp_path, given, overwrite=True)
    assert files(tmp_path) == before


def test_no_output_is_the_tokenizer_or_a_list(tmp_path: Path, corpus: Path) -> None:
    run(tmp_path, corpus)
    json = shutil.copy(tmp_path / "out.tokenizer" / "tokenizer.json", tmp_path / "t.json")
    with pytest.raises(DataError, match=r"t.json: is the tokenizer, and would be replaced"):
        run(tmp_path, corpus, output="t", tokenizer=Path(json), overwrite=True)
    with pytest.raises(DataError, match=r"out.tokenizer.*: is the tokenizer, and would be replaced"):
        run(tmp_path, corpus, tokenizer=tmp_path / "out.tokenizer", overwrite=True)
    (tmp_path / "l.json").write_text(f"{corpus}\n")
    with pytest.raises(DataError, match=r"l.json: is an input, and would be replaced"):
        run(tmp_path, f"@{tmp_path / 'l.json'}", output="l", overwrite=True)


def test_no_output_of_merge_is_an_input_by_any_name(tmp_path: Path, corpus: Path) -> None:
    run(tmp_path, corpus, output="one")
    (tmp_path / "here").symlink_to(tmp_path)
    one, again = str(tmp_path / "one"), str(tmp_path / "here" / "one")
    with pytest.raises(ConfigError, match="is both output and input"):
        merge(again, [one], overwrite=True)
    with pytest.raises(ConfigError, match=r"here/one: is named twice \(also as "):
        merge(str(tmp_path / "two"), [one, again])
    assert verify(one) == []


def test_a_vocabulary_replaces_vocabularies_alone(tmp_path: Path, corpus: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("the cat sat\n\n" * 40)
    words = ["--vocab-size", "16", "--overwrite"]
    for given, output, message in (
        (book, book, "book.txt: is an input, and would be replaced; choose another --output"),
        (corpus, book, "book.txt: is in the way and not of our making"),
        (tmp_path / "*.txt", book, "book.txt: is in the way and not of our making"),
    ):
        done = run_program("train_tokenizer", "--input", given, "--output", output, *words)
        assert (done.returncode, message in done.stderr) == (1, True), done.stderr
    assert book.read_text() == "the cat sat\n\n" * 40
    # The vocabulary in the folder is no text, so it may be made anew.
    done = run_program("train_tokenizer", "--input", tmp_path, "--output", tmp_path / "vocab.txt", *words)
    assert done.returncode == 0, done.stderr


def test_an_input_that_changes_during_the_run_ends_it(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_tools.output.resumable import ResumableRun

    append = ResumableRun.append

    def grow(*arguments: Any) -> None:
        with corpus.open("a") as file:
            file.write('{"text": "mat"}\n')
        append(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ResumableRun, "append", grow)
        with pytest.raises(
            DataError, match=r"x.jsonl: was changed while it was read \(\d+ bytes, now \d+\); .*--restart"
        ):
            run(tmp_path, corpus)
    assert not (tmp_path / "out.json").exists()
    run(tmp_path, corpus, restart=True)
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize("suffix", ["lock", "json", "rejects.jsonl"])
def test_a_pipe_in_the_way_is_not_opened(tmp_path: Path, corpus: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"out.{suffix}")
    with pytest.raises(DataError, match=rf"out.{suffix}: is in the way"):
        run(tmp_path, corpus, overwrite=True)


def test_a_lock_is_not_taken_through_a_link(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "out.lock").symlink_to("elsewhere")
    with pytest.raises(DataError, match=r"out.lock: is in the way"):
        run(tmp_path, corpus)
    assert not (tmp_path / "elsewhere").exists()


def test_a_torn_list_of_rejects_takes_nothing_along(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "the cat"}\nno JSON\n')
        run(tmp_path, tmp_path / f"{name}.jsonl", output=name)
    first = tmp_path / "a.rejects.jsonl"
    first.write_bytes(first.read_bytes()[:-5])
    merge(str(tmp_path / "out"), [str(tmp_path / "a"), str(tmp_path / "b")])
    lines = (tmp_path / "out.rejects.jsonl").read_bytes().splitlines(keepends=True)
    assert lines == [first.read_bytes() + b"\n", (tmp_path / "b.rejects.jsonl").read_bytes()]


def test_what_is_recognised(tmp_path: Path) -> None:
    assert is_lock(b"host far, pid 5, job none\n")
    assert is_lock(b"")  # left by a crash
    assert not is_lock(b"mine\n")
    line = b'0123456789abcdef {"version": "0.1.0", "tokenizer": "", "hash_range": "", "cleaning": {}, "inputs": {}}'
    for data in (line, line[:9], line[:40], b"x" + line):  # torn, or damaged
        assert is_journal(data)
    assert not is_journal(b'{"text": "a"}\n')
    reject = b'{"path": "x", "line": 1, "byte": 2, "reason": "", "excerpt": "", "message": ""}\n'
    assert is_rejects(reject)
    assert is_rejects(reject[:20])
    assert not is_rejects(b'{"path": "x", "text": "a"}\n')
    assert not is_manifest(b'{"tokenizer": "a"}\n')
    for name, data in {
        "a.txt": b"[PAD] [UNK] [CLS] [SEP] [MASK]\n",
        "a.bin": b"12",
        "a.json": b'{"text": "x"}',
    }.items():
        (tmp_path / name).write_bytes(data)
        assert product_at(str(tmp_path / name)) is None
