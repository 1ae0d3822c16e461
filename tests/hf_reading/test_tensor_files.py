"""Files of tensors are read, or called what they are with what to do."""

from __future__ import annotations

import fractions
import json
import random
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
import torch
from hf_folders import random_bert
from safetensors.torch import load_file, save_file

from pretrain.errors import DataError
from pretrain.hf_reading.tensor_files import read_tensors

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return random_bert(tmp_path / "hf")


def split(folder: Path, *, torch_files: bool = False) -> dict[str, torch.Tensor]:
    """Replace model.safetensors by two shards and their index; the tensors that they hold."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    base, end = ("pytorch_model", "bin") if torch_files else ("model", "safetensors")
    shards = {name: f"{base}-{1 + number % 2:05d}-of-00002.{end}" for number, name in enumerate(tensors)}
    for shard in set(shards.values()):
        part = {name: tensor for name, tensor in tensors.items() if shards[name] == shard}
        if torch_files:
            torch.save(part, folder / shard)
        else:
            save_file(part, folder / shard)
    (folder / f"{base}.{end}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return tensors


@pytest.mark.parametrize("torch_files", [False, True])
def test_shards_are_read(folder: Path, torch_files: bool) -> None:
    expected = split(folder, torch_files=torch_files)
    tensors, source = read_tensors(folder)
    assert source.endswith("index.json (2 files)")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "1 of which are missing: model-00002-of-00002"),
        (lambda f: (f / "model-00001-of-00002.safetensors").write_bytes(b""), "model-00001-of-00002.*is empty"),
        (
            lambda f: save_file({"a": torch.ones(1)}, f / "model-00001-of-00002.safetensors"),
            "lacks bert.*and 1[0-9] more",
        ),
        (
            lambda f: (f / INDEX).write_text('{"weight_map": {"a": "../model.safetensors"}}'),
            "outside its folder: '../mod",
        ),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"a": "/etc/passwd"}}'), "outside its folder: '/etc/passwd'"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"a": ".."}}'), "outside its folder: '..'"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"a": 1}}'), "outside its folder: 1"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {}}'), "expected the file of each tensor"),
        (lambda f: (f / INDEX).write_text("[1]"), "cannot be read as an index of shards"),
        (lambda f: (f / INDEX).write_text("{"), "cannot be read as an index of shards"),
        (lambda f: (f / INDEX).write_text("version https://git-lfs.github.com/spec/v1\noid a\n"), "pointer of Git LFS"),
    ],
)
def test_incomplete_shards_are_named(folder: Path, change: Callable[[Path], object], words: str) -> None:
    split(folder)
    change(folder)
    with pytest.raises(DataError, match=words):
        read_tensors(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty; fetch the file again"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 9\n",
            "is a pointer of Git LFS.*git lfs pull",
        ),
        (b"/annex/objects/SHA256E-s9--0a.bin\n", "is a pointer of git-annex.*git annex get"),
        (b"# xet version 0\n", "is a pointer of a Xet store"),
        (b"\n<!DOCTYPE html><title>Sign in</title>", "is a web page"),
        (None, "cannot be read as tensors .*; was it fetched completely"),
    ],
)
def test_what_only_stands_for_weights_is_called_what_it_is(
    folder: Path, name: str, content: bytes | None, words: str
) -> None:
    if name == "pytorch_model.bin":
        torch.save(load_file(folder / "model.safetensors"), folder / name)
        (folder / "model.safetensors").unlink()
    half = (folder / name).read_bytes()[: (folder / name).stat().st_size // 2]
    (folder / name).write_bytes(half if content is None else content)
    with pytest.raises(DataError, match=words) as caught:
        read_tensors(folder)
    assert str(folder / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_link_to_nowhere_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../../blobs/0a")
    with pytest.raises(DataError, match=r"is a link to ../../blobs/0a, which is not there; .*cp -rL"):
        read_tensors(folder)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tf_model.h5", "tf_model.h5, weights of TensorFlow"),
        ("flax_model.msgpack", "weights of Flax"),
        ("bert_model.ckpt.index", "a checkpoint of TensorFlow"),
        ("adapter_model.safetensors", "an adapter; merge it"),
        ("model.fp16.safetensors", "rename the file to model.safetensors"),
        ("mp_rank_00_model_states.pt", "rename the file to pytorch_model.bin"),
        ("training_args.bin", "has no model.safetensors, pytorch_model.bin or their shards"),
    ],
)
def test_a_folder_with_other_files_is_explained(folder: Path, name: str, words: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(DataError, match=words):
        read_tensors(folder)


@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "model", "module"])
def test_tables_within_what_a_program_saved_are_found(folder: Path, key: str | None) -> None:
    expected = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    saved = expected if key is None else {key: expected, "step": 3, "optimizer": {"state": {0: torch.ones(1)}}}
    torch.save(saved, folder / "pytorch_model.bin")
    tensors, _ = read_tensors(folder)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_a_damaged_file_of_torch_is_one_line_whatever_its_damage(tmp_path: Path) -> None:
    path, content, generator = tmp_path / "pytorch_model.bin", BytesIO(), random.Random(0)
    messages = []
    torch.save({f"tensor{number}": torch.ones(8) for number in range(6)}, content, _use_new_zipfile_serialization=False)
    for _ in range(200):
        damaged = bytearray(content.getvalue())
        damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            read_tensors(tmp_path)
        except DataError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert not [message for message in messages if "\n" in message]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {"state_dict": {"a": torch.ones(1)}, "args": fractions.Fraction(1, 2)},
            r"Python objects \(fractions.Fraction\)",
        ),
        ([1, 2], "expected a table of tensors by name, found one object of type list"),
        ({"epoch": 3, "net": {"a": 1}}, "expected a table of tensors by name, found a table of epoch, net"),
    ],
)
def test_what_holds_no_table_of_tensors_is_refused_in_one_line(folder: Path, content: object, words: str) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(DataError, match=words) as caught:
        read_tensors(folder)
    assert "\n" not in str(caught.value)
