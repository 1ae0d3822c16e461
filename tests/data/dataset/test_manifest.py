"""The manifest: what is saved is loaded, and a bad field is named."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from dataset_builders import write_dataset

from pretrain import durable
from pretrain.data.dataset.manifest import Dropped, Manifest
from pretrain.errors import DataError

PREPROCESSING = {
    "inputs": ["a.jsonl"],
    "tokenizer": "vocab.txt",
    "cased": False,
    "hash_range": "0:1",
    "dedup": False,
    "reading": {"json_key": "text", "delimiter": None, "has_header": True},
    "cleaning": {"min_chars": 0},
}


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_dataset(tmp_path / "a", [[[5, 6, 7]], [[8]]])


def test_a_saved_manifest_is_loaded_again(manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "copy.json"
    manifest.save(path)
    assert Manifest.load(path) == manifest
    assert Manifest.load(tmp_path / "a.json") == manifest
    assert not path.with_name("copy.json.tmp").exists()


def change(path: Path, keys: list[str], value: Any) -> None:
    """As a program of another release might have written it: with another value and a hash that fits."""
    tree = json.loads(path.read_text())
    table = tree
    for key in keys[:-1]:
        table = table[key]
    table[keys[-1]] = value
    del tree[durable.SELF_HASH]
    path.write_text(durable.seal_json(tree, "text"))


@pytest.mark.parametrize(
    ("keys", "value", "named"),
    [
        (["format_version"], 1, "format_version: expected 2, found 1; restore it"),
        (["tokens"], -1, "tokens"),
        (["tokens"], "4", "tokens"),
        (["tokens"], 4.5, "tokens"),
        (["dtype"], "float64", "dtype"),
        (["tokenizer", "vocab_size"], 0, "tokenizer.vocab_size"),
        (["tokenizer", "sha256"], "xyz", "tokenizer.sha256"),
        (["tokenizer", "kind"], "bytes", "tokenizer.kind"),
        (["tokenizer", "special", "mask"], 100, "tokenizer.special.mask (100) must be below vocab_size (100)"),
        (["bin_xxh64"], [], "bin_xxh64: expected 1 hashes"),
        (["dropped"], {"empty": {"documents": -2}}, "dropped.empty.documents"),
        (["surprise"], 1, "surprise"),
        (["tokenizer_files"], [{"name": "../x", "num_bytes": 1, "xxh3_128": ""}], "outside the tokenizer's folder"),
        (["tokenizer"], None, "tokenizer"),
        (["preprocessing"], PREPROCESSING | {"dedup": 1}, "preprocessing.dedup"),
        (["preprocessing"], PREPROCESSING | {"inputs": "a.jsonl"}, "preprocessing.inputs"),
        (["preprocessing"], PREPROCESSING | {"cleaning": {"min_chars": 0.5}}, "preprocessing.cleaning.min_chars"),
        (["preprocessing"], PREPROCESSING | {"surprise": 1}, "preprocessing.surprise"),
    ],
)
def test_a_bad_field_is_named(manifest: Manifest, tmp_path: Path, keys: list[str], value: Any, named: str) -> None:
    path = tmp_path / "a.json"
    change(path, keys, value)
    with pytest.raises(DataError) as error:
        Manifest.load(path)
    assert named in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00", "[" * 5000, "null"])
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(DataError, match="a.json"):
        Manifest.load(path)


def test_a_flipped_bit_anywhere_is_found(manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    good = path.read_bytes()
    for bit in range(0, 8 * len(good), 7):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="a.json"):
            Manifest.load(path)
    path.write_bytes(good)
    assert Manifest.load(path) == manifest


def test_an_edited_or_unsealed_manifest_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    good = path.read_text()
    path.write_text(good.replace('"documents": 2', '"documents": 1'))
    with pytest.raises(DataError, match="content differs from what was written"):
        Manifest.load(path)
    tree = json.loads(good)
    del tree[durable.SELF_HASH]
    path.write_text(json.dumps(tree))
    with pytest.raises(DataError, match="self_xxh3_128: is missing"):
        Manifest.load(path)


def test_any_text_in_a_command_is_kept(manifest: Manifest, tmp_path: Path) -> None:
    odd = replace(manifest, command=('a\x1b\u2028\n"', "\udc80é"))
    odd.save(tmp_path / "b.json")
    assert Manifest.load(tmp_path / "b.json").command == ('a\x1b\u2028\n"', "?é")


def test_a_missing_field_is_named(manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    tree = json.loads(path.read_text())
    del tree["idx_xxh64"]
    path.write_text(json.dumps(tree))
    with pytest.raises(DataError, match="idx_xxh64: field required"):
        Manifest.load(path)


def test_options_of_preprocessing_keep_their_types(manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    change(path, ["preprocessing"], PREPROCESSING)
    loaded = Manifest.load(path)
    assert loaded.preprocessing is not None
    assert json.loads(json.dumps(asdict(loaded.preprocessing))) == PREPROCESSING
    assert loaded.preprocessing.reading["has_header"] is True


def test_dropped_documents_are_kept_by_reason(manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    change(path, ["dropped"], {"empty": {"documents": 3, "tokens": 0, "bytes": 12}})
    assert Manifest.load(path).dropped == {"empty": Dropped(3, 0, 12)}
