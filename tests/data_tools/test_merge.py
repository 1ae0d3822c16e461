"""Parts made by many jobs and merged are, byte for byte, the dataset made at once; whatever does not fit is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from corpora import run_program, write_bytes, write_jsonl, write_vocab

from data_tools.encoding.cleaning import CleaningOptions
from data_tools.encoding.encode import EncodeOptions
from data_tools.merge import merge
from data_tools.preprocess import preprocess
from data_tools.readers import ReadOptions
from pretrain.data.dataset.indexed_dataset import IndexedDataset
from pretrain.data.dataset.manifest import Manifest
from pretrain.data.dataset.verification import verify
from pretrain.errors import ConfigError, DataError

SUFFIXES = (".bin", ".idx", ".json", ".rejects.jsonl")


def write_corpus(folder: Path) -> list[str]:
    """A plain, a compressed and a text file, with faults, empty documents and duplicates."""
    maker = random.Random(4)
    words = ["The", "cat", "sat.", "A", "mat!", "And", "café", "中文。"]
    texts = [" ".join(maker.choices(words, k=maker.randrange(0, 12))) for _ in range(200)]
    plain = write_jsonl(folder / "a.jsonl", texts)
    lines = plain.read_bytes().split(b"\n")
    lines[17], lines[150] = b'{"text": ', b'{"text": 7}'
    plain.write_bytes(b"\n".join(lines))
    write_jsonl(folder / "b.jsonl.gz", texts[100:])
    write_bytes(folder / "c.txt", "\n\n".join(text for text in texts if text).encode())
    return [str(folder / name) for name in ("a.jsonl", "b.jsonl.gz", "c.txt")]


def options(folder: Path, **cleaning: Any) -> EncodeOptions:
    reading = ReadOptions(chunk_bytes=300, on_error="skip")
    return EncodeOptions(str(write_vocab(folder)), reading=reading, cleaning=CleaningOptions(**cleaning))


def content(folder: Path, name: str = "out") -> dict[str, bytes]:
    files = {suffix: Path(f"{folder / name}{suffix}") for suffix in SUFFIXES}
    tokenizer = {path.name: path.read_bytes() for path in (folder / f"{name}.tokenizer").iterdir()}
    return {**{suffix: path.read_bytes() for suffix, path in files.items() if path.exists()}, **tokenizer}


def take_away(folder: Path, name: str = "out") -> dict[str, bytes]:
    found = content(folder, name)
    for path in [*folder.glob(f"{name}.*")]:
        if path.is_dir():
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
        else:
            path.unlink()
    return found


def make_parts(folder: Path, inputs: list[str], count: int, dedup: bool = False, **cleaning: Any) -> list[str]:
    names = [str(folder / f"part{count}-{number}") for number in range(count)]
    for number, name in enumerate(names):
        preprocess(inputs, options(folder, **cleaning), name, shard=(number, count), dedup=dedup)
    return names


@pytest.mark.parametrize("sentences", [False, True])
@pytest.mark.parametrize("dedup", [False, True])
def test_parts_merged_are_the_dataset_made_at_once(tmp_path: Path, sentences: bool, dedup: bool) -> None:
    inputs = write_corpus(tmp_path)
    preprocess(inputs, options(tmp_path, split_sentences=sentences), str(tmp_path / "out"), dedup=dedup)
    whole = take_away(tmp_path)
    assert (b'"duplicate"' in whole[".json"]) == dedup
    assert whole[".rejects.jsonl"].count(b"\n") == 2
    for count in (1, 2, 3, 5):
        for dedup_parts in {False, dedup}:
            parts = make_parts(tmp_path, inputs, count, dedup_parts, split_sentences=sentences)
            random.Random(count).shuffle(parts)
            report = merge(str(tmp_path / "out"), parts, dedup=dedup, memory=200)
            assert verify(tmp_path / "out") == []
            assert report.documents == IndexedDataset(tmp_path / "out").num_documents
            assert take_away(tmp_path) == whole
            for part in parts:
                take_away(tmp_path, Path(part).name)


def test_datasets_joined_are_one_run_over_all_inputs(tmp_path: Path) -> None:
    inputs = write_corpus(tmp_path)
    preprocess(inputs, options(tmp_path), str(tmp_path / "out"))
    whole = take_away(tmp_path)
    for number, path in enumerate(inputs):
        preprocess([path], options(tmp_path), str(tmp_path / f"single{number}"))
    merge(str(tmp_path / "out"), [f"{tmp_path}/single{number}.json" for number in range(3)])
    assert take_away(tmp_path) == whole


def test_a_part_may_be_empty_but_not_the_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["the cat", "sat"])
    preprocess([str(path)], options(tmp_path), str(tmp_path / "out"))
    whole = take_away(tmp_path)
    parts = make_parts(tmp_path, [str(path)], 4)
    assert "warning: part 3 of 4 gave no token" in capsys.readouterr().err
    assert [verify(part) for part in parts] == [[]] * 4
    merge(str(tmp_path / "out"), parts)
    assert take_away(tmp_path) == whole
    empty = write_jsonl(tmp_path / "b.jsonl", ["", " "])
    with pytest.raises(DataError, match="hold no token"):
        merge(str(tmp_path / "out"), make_parts(tmp_path, [str(empty)], 3))
    assert not list(tmp_path.glob("out*"))


def test_missing_and_double_parts_are_named(tmp_path: Path) -> None:
    inputs = write_corpus(tmp_path)
    parts, out = make_parts(tmp_path, inputs, 4), str(tmp_path / "out")
    with pytest.raises(DataError, match=r"part 1, 2 of 4 is missing beside .*--shard 1/4"):
        merge(out, [parts[3], parts[0]])
    preprocess(inputs, options(tmp_path), str(tmp_path / "again"), shard=(2, 4))
    with pytest.raises(DataError, match=r"again: is part 2 of 4, as .*part4-2 is"):
        merge(out, [*parts, str(tmp_path / "again")])
    preprocess(inputs, options(tmp_path), str(tmp_path / "other"), shard=(2, 5))
    with pytest.raises(DataError, match=r"other: is part \(2, 5\) of another division"):
        merge(out, [*parts, str(tmp_path / "other")])
    with pytest.raises(ConfigError, match="is named twice"):
        merge(out, [*parts, parts[1]])
    with pytest.raises(ConfigError, match="both output and input"):
        merge(parts[0], parts)
    assert not list(tmp_path.glob("out*"))


def test_parts_of_changed_inputs_are_refused_with_the_change(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", str(tmp_path / "out")
    folder.mkdir()
    write_jsonl(folder / "b.jsonl", ["the cat"] * 30)
    write_jsonl(folder / "c.jsonl", ["sat"] * 30)

    def part(number: int) -> str:
        name = str(tmp_path / f"part{number}-{len(list(tmp_path.iterdir()))}")
        preprocess([str(folder)], options(tmp_path), name, shard=(number, 2))
        return name

    def refuse(*words: str) -> None:
        for mixed in (False, True):
            with pytest.raises(DataError, match=r".*".join(words)):
                merge(out, [first, part(1)], is_mixed=mixed)

    first = part(0)
    (tmp_path / "corpus-2").mkdir()
    write_jsonl(folder / "a.jsonl", ["mat"])
    refuse("was made from other inputs than .*part0", r"in/a.jsonl is new \(\d+ bytes\)", "preprocess all parts from")
    (folder / "a.jsonl").rename(tmp_path / "corpus-2" / "d.jsonl")
    write_jsonl(folder / "b.jsonl", ["the cat"] * 31)
    refuse("was made from other inputs than", r"in/b.jsonl: size \d+, now \d+")
    (folder / "c.jsonl").unlink()
    refuse("in/c.jsonl is missing")
    write_jsonl(folder / "b.jsonl", ["the mat"] * 30)
    write_jsonl(folder / "c.jsonl", ["sat"] * 30)
    last = part(1)
    with pytest.raises(DataError, match=r"in/[bc].jsonl: modified .*, now .*; names and sizes agree.*--mixed joins"):
        merge(out, [first, last])
    preprocess([f"{folder}/c.jsonl", f"{folder}/b.jsonl"], options(tmp_path), str(tmp_path / "turned"), shard=(1, 2))
    with pytest.raises(DataError, match=r"turned: is part 1 of 2, but of other inputs .*: their order: .*in/b.jsonl"):
        merge(out, [first, str(tmp_path / "turned")])
    assert merge(out, [first, last], is_mixed=True).documents == 60


def copy_by_archive(source: str, target: str) -> None:
    """A copy with the time in seconds."""
    shutil.copy(source, target)
    os.utime(target, (0, os.stat(source).st_mtime_ns // 10**9))


@pytest.mark.parametrize("copy", [shutil.copy, shutil.copy2, copy_by_archive])
def test_parts_are_recognised_at_another_place(
    tmp_path: Path, copy: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    inputs = write_corpus(tmp_path / "here")
    preprocess(inputs, options(tmp_path), str(tmp_path / "out"))
    whole = take_away(tmp_path)
    shutil.copytree(tmp_path / "here", tmp_path / "there", copy_function=copy)
    keeps_times = copy is not shutil.copy
    preprocess(inputs, options(tmp_path), str(tmp_path / "p0"), shard=(0, 3))
    preprocess([str(tmp_path / "there")], options(tmp_path), str(tmp_path / "p1"), shard=(1, 3))
    monkeypatch.chdir(tmp_path / "there")
    preprocess(["*"], options(tmp_path), str(tmp_path / "p2"), shard=(2, 3))
    parts = [str(tmp_path / f"p{number}") for number in range(3)]
    if not keeps_times:
        with pytest.raises(
            DataError, match=r"p1: is part 1 of 3, but of other inputs \(.*there/a.jsonl, .*\) than .*p0"
        ):
            merge(str(tmp_path / "out"), parts)
    capsys.readouterr()
    merge(str(tmp_path / "out"), parts, is_mixed=not keeps_times)
    assert "p1: read its inputs at another place" in capsys.readouterr().err
    found = take_away(tmp_path)
    assert {name for name in whole if found[name] != whole[name]} == {".rejects.jsonl"}  # paths


def test_parts_without_a_record_of_their_inputs_are_told_by_the_command(tmp_path: Path) -> None:
    """As release 0.1.0 wrote them."""
    inputs, out = write_corpus(tmp_path), str(tmp_path / "out")
    (tmp_path / "there").mkdir()
    moved = [str(shutil.copy2(path, tmp_path / "there")) for path in inputs]
    parts = []
    for number, given in enumerate((inputs, inputs, moved)):
        parts.append(str(tmp_path / f"p{number}"))
        preprocess(given, options(tmp_path), parts[-1], shard=(number % 2, 2))
        path = Path(f"{parts[-1]}.json")
        if number != 1:
            replace(Manifest.load(path), shard_inputs=None).save(path)
    merge(out, parts[:2])
    whole = take_away(tmp_path)
    merge(out, [parts[2], parts[1]], is_mixed=True)
    assert take_away(tmp_path)[".bin"] == whole[".bin"]
    with pytest.raises(DataError, match=r"p1: is part 1 of 2, but of other inputs .*if these are the same.*--mixed"):
        merge(out, [parts[2], parts[1]])


def test_parts_cut_by_other_rules_are_refused(tmp_path: Path) -> None:
    inputs = write_corpus(tmp_path)
    first, plain = str(tmp_path / "p0"), options(tmp_path)
    preprocess(inputs, plain, first, shard=(0, 2))
    other = EncodeOptions(plain.tokenizer, reading=replace(plain.reading, text_documents="line"))
    preprocess(inputs, other, str(tmp_path / "p1"), shard=(1, 2))
    with pytest.raises(DataError, match=r"p1: with text_documents 'line' the inputs are cut at other places"):
        merge(str(tmp_path / "out"), [first, str(tmp_path / "p1")], is_mixed=True)


def test_datasets_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    inputs, out = write_corpus(tmp_path), str(tmp_path / "out")
    first, cased, short, unique = (str(tmp_path / name) for name in ("first", "cased", "short", "unique"))
    plain = options(tmp_path)
    preprocess(inputs[:1], plain, first)
    preprocess(inputs[1:], EncodeOptions(plain.tokenizer, cased=True, reading=plain.reading), cased)
    preprocess(inputs[1:], options(tmp_path, min_tokens=3), short)
    preprocess(inputs[1:], plain, unique, dedup=True)
    with pytest.raises(DataError, match=r"cased: tokenizer.sha256: expected \w+ as of .*first"):
        merge(out, [first, cased])
    with pytest.raises(DataError, match=r"short: command: .*--min-tokens 3; --mixed joins them"):
        merge(out, [first, short])
    with pytest.raises(DataError, match=r"unique: was made with --dedup"):
        merge(out, [first, unique])
    report = merge(out, [first, short], is_mixed=True)
    assert verify(out) == []
    manifest = IndexedDataset(out).manifest
    assert manifest is not None
    assert manifest.command == ("taco", "data", "merge", out, first, short, "--mixed")
    assert report.dropped["too_few_tokens"].documents > 0
    with pytest.raises(DataError, match="out.json: exists already"):
        merge(out, [first, short], is_mixed=True)


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
def test_damaged_inputs_are_found_while_copying(tmp_path: Path, suffix: str) -> None:
    parts = make_parts(tmp_path, write_corpus(tmp_path), 2)
    path = Path(f"{parts[1]}{suffix}")
    good = path.read_bytes()
    for position in range(0, len(good), max(len(good) // 13, 1)):
        data = bytearray(good)
        data[position] ^= 4
        path.write_bytes(data)
        with pytest.raises(DataError, match="part2-1"):
            merge(str(tmp_path / "out"), parts)
    path.write_bytes(good[:-1])
    with pytest.raises(DataError, match="part2-1"):
        merge(str(tmp_path / "out"), parts)
    path.unlink()
    with pytest.raises(DataError, match="part2-1"):
        merge(str(tmp_path / "out"), parts)
    assert not list(tmp_path.glob("out*"))


def test_large_documents_and_small_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = write_corpus(tmp_path)
    preprocess(inputs, options(tmp_path, split_sentences=True), str(tmp_path / "out"))
    whole = take_away(tmp_path)
    monkeypatch.setattr("data_tools.output.merge_inputs._COPY_BYTES", 9)
    monkeypatch.setattr("data_tools.output.merge_inputs._DOCUMENTS_AT_ONCE", 3)
    merge(str(tmp_path / "out"), make_parts(tmp_path, inputs, 3, split_sentences=True))
    assert take_away(tmp_path) == whole


def test_the_program(tmp_path: Path) -> None:
    parts = make_parts(tmp_path, write_corpus(tmp_path), 2)
    done = run_program("merge", tmp_path / "out", *parts, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["documents"] == IndexedDataset(tmp_path / "out").num_documents
    assert all(Path(path).exists() for path in report["files"])
    done = run_program("merge", tmp_path / "out", parts[0], "--overwrite")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: part 1 of 2 is missing")
    assert verify(tmp_path / "out") == []
