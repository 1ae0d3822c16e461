"""Datasets of release 0.1.0, whose manifests tell their options by the command alone: they open, verify and merge."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from project import ROOT

from data_tools.encoding.cleaning import CleaningOptions
from data_tools.encoding.encode import EncodeOptions, parse_hash_range
from data_tools.merge import merge
from data_tools.output.old_manifests import options_of_command
from data_tools.output.recorded_options import command_words, record_options
from data_tools.preprocess import preprocess
from data_tools.readers import ReadOptions
from pretrain.data.dataset.indexed_dataset import IndexedDataset
from pretrain.data.dataset.manifest import Manifest
from pretrain.data.dataset.verification import verify
from pretrain.errors import DataError

# Two parts of corpus.jsonl, written by release 0.1.0 with OPTIONS in this folder, and the merge of both by it.
FIXTURE = ROOT / "tests" / "fixtures" / "dataset-0.1.0"
MERGED_SHA256 = {
    ".bin": "6533628296567ea74de8f6c391163b1543d670abae62b5172d2473ee0b45f5b7",
    ".idx": "8c6bdb50c607bcd077a82e2fec56873513f16713e784505f8e46bc3187e256d0",
}
OPTIONS = EncodeOptions(
    "vocab.txt",
    reading=ReadOptions(json_key="body", on_error="skip", max_document_bytes=5000, chunk_bytes=160),
    hash_range=parse_hash_range("0:0.99"),
    cleaning=CleaningOptions(normalize="nfkc", fold_whitespace=True, min_chars=4, max_tokens=30, split_sentences=True),
)
ALL_OPTIONS = EncodeOptions(
    "a vocabulary.txt",
    cased=True,
    hash_range=parse_hash_range("0.25:0.95"),
    reading=ReadOptions(
        json_key="7",
        input_format="tsv.gz",
        text_documents="line",
        on_error="replace",
        max_document_bytes=77,
        delimiter="-",
        quoting="none",
        has_header=False,
        max_ratio=0,
    ),
    cleaning=CleaningOptions("nfc", "drop", True, 1, 2, 3, 4, True),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the old datasets, as the current folder: their commands name files relative to it."""
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files_of(folder: Path, name: str) -> dict[str, bytes]:
    paths = [folder / f"{name}{suffix}" for suffix in (".bin", ".idx", ".json", ".rejects.jsonl")]
    paths += sorted((folder / f"{name}.tokenizer").iterdir())
    return {path.name: path.read_bytes() for path in paths}


def test_old_datasets_open_and_verify(folder: Path) -> None:
    for name, documents in (("part-0", 3), ("part-1", 2)):
        manifest = Manifest.load(folder / f"{name}.json")
        assert (manifest.preprocessing, manifest.created_by) == (None, "taco-pretrain 0.1.0")
        assert verify(folder / name) == []
        assert len(IndexedDataset(folder / name)) == documents


@pytest.mark.parametrize("old", [("part-0", "part-1"), ("part-0",), ("part-1",), ()])
def test_old_and_new_parts_merge_to_the_dataset_made_at_once(folder: Path, old: tuple[str, ...]) -> None:
    preprocess(["corpus.jsonl"], OPTIONS, "out")
    whole = files_of(folder, "out")
    shutil.rmtree("out.tokenizer")
    for path in folder.glob("out.*"):
        path.unlink()
    for number in range(2):
        if f"part-{number}" not in old:
            preprocess(["corpus.jsonl"], OPTIONS, f"part-{number}", shard=(number, 2), overwrite=True)
    merge("out", ["part-1", "part-0"])
    assert files_of(folder, "out") == whole
    for suffix, digest in MERGED_SHA256.items():
        assert hashlib.sha256(whole[f"out{suffix}"]).hexdigest() == digest
    assert Manifest.load(folder / "out.json").preprocessing == record_options(["corpus.jsonl"], OPTIONS, dedup=False)


def test_an_old_dataset_with_other_options_is_refused(folder: Path) -> None:
    other = replace(OPTIONS, cleaning=replace(OPTIONS.cleaning, min_chars=5))
    preprocess(["corpus.jsonl"], other, "part-0", shard=(0, 2), overwrite=True)
    with pytest.raises(DataError, match=r"part-1: command: .*--min-chars 5.* as of part-0, found .*--min-chars 4"):
        merge("out", ["part-0", "part-1"])


@pytest.mark.parametrize("dedup", [False, True])
@pytest.mark.parametrize(
    "options",
    [EncodeOptions("vocab.txt"), EncodeOptions("a", reading=ReadOptions(json_key="--dedup")), OPTIONS, ALL_OPTIONS],
)
def test_every_option_is_read_from_a_command(options: EncodeOptions, dedup: bool) -> None:
    record = record_options(["a b.jsonl", "-c.gz"], options, dedup=dedup)
    words = command_words(record, "out")
    assert words[:6] == ["taco", "data", "preprocess", "--input", "a b.jsonl", "-c.gz"]
    assert options_of_command(Path("a.json"), words) == record


def test_commands_of_other_programs_have_no_options_and_strange_ones_are_refused() -> None:
    path = Path("a.json")
    assert options_of_command(path, ["taco", "data", "merge", "out", "a", "b", "--mixed"]) is None
    assert options_of_command(path, ["preprocess", "--workers", "1"]) is None
    command = command_words(record_options(["a"], EncodeOptions("vocab.txt"), dedup=False), "out")
    for more in (["--surprise", "1"], ["--min-chars", "few"], ["--min-chars"], ["--normalize", "nfd"]):
        with pytest.raises(DataError, match=r"a\.json: command: cannot be understood"):
            options_of_command(path, command + more)
