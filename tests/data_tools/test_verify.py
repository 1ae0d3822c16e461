"""Every damaged byte is found and named; a sound dataset is called sound."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from corpora import TEXTS, run_program, write_jsonl, write_vocab
from fault_records import FaultRecorder

from data_tools.encoding.encode import EncodeOptions
from data_tools.preprocess import preprocess
from data_tools.verify import check_dataset
from pretrain.data.dataset.manifest import Manifest


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    path, vocab = write_jsonl(tmp_path / "x.jsonl", TEXTS), write_vocab(tmp_path)
    preprocess([str(path)], EncodeOptions(str(vocab)), str(tmp_path / "out"))
    return tmp_path / "out"


def flip(path: Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def test_sound_datasets(prefix: Path):
    done = run_program("verify", prefix, f"{prefix}.json")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("sound: 5 documents") == 2


@pytest.mark.fault("data-size")
@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_every_flipped_bit_is_found(prefix: Path, suffix: str, fault: FaultRecorder):
    path = Path(f"{prefix}{suffix}")
    size = path.stat().st_size
    for number in range(40):
        offset, bit = (number * 7919) % size, number % 8
        flip(path, offset, bit)
        result = check_dataset(str(prefix))
        assert not result["ok"]
        assert any(f"{prefix}." in problem for problem in result["problems"])
        flip(path, offset, bit)
    assert check_dataset(str(prefix))["ok"]
    fault.record("data-size", injected=40, survived=40)


def test_damage_is_named_and_ends_with_1(prefix: Path):
    flip(Path(f"{prefix}.bin"), 100)
    done = run_program("verify", prefix)
    assert done.returncode == 1
    assert "out.bin" in done.stdout
    assert "bytes 0 to" in done.stdout
    done = run_program("verify", prefix, prefix.parent / "missing", "--json")
    assert done.returncode == 1
    results = json.loads(done.stdout)
    assert [result["ok"] for result in results] == [False, False]
    assert "missing" in results[1]["problems"][0]


@pytest.mark.fault("tokenizer")
def test_damage_in_the_tokenizer_folder_is_found(prefix: Path):
    folder = Path(f"{prefix}.tokenizer")
    for path in sorted(folder.iterdir()):
        flip(path, path.stat().st_size // 2)
        assert check_dataset(str(prefix))["problems"][0].startswith(f"{path}: expected xxh3-128")
        flip(path, path.stat().st_size // 2)
    assert check_dataset(str(prefix))["ok"]
    (folder / "vocab.txt").write_text("more\n")
    assert f"{folder / 'vocab.txt'}: expected" in check_dataset(str(prefix))["problems"][0]
    (folder / "vocab.txt").unlink()
    assert f"{folder / 'vocab.txt'}: is missing" in check_dataset(str(prefix))["problems"][0]


@pytest.mark.fault("tokenizer")
def test_a_tokenizer_put_beside_the_data_later_must_have_made_it(prefix: Path):
    json_path, vocab = Path(f"{prefix}.json"), Path(f"{prefix}.tokenizer") / "vocab.txt"
    replace(Manifest.load(json_path), tokenizer_files=()).save(json_path)
    assert check_dataset(str(prefix))["ok"]
    vocab.write_text(vocab.read_text(encoding="utf-8") + "more\n", encoding="utf-8")
    assert "expected the tokenizer with sha256" in check_dataset(str(prefix))["problems"][0]
    vocab.unlink()
    assert "vocab.txt" in check_dataset(str(prefix))["problems"][0]


def test_deep_and_json_tell_what_a_sound_dataset_holds(prefix: Path):
    done = run_program("verify", prefix, "--deep", "--threads", "2", "--json")
    (report,) = json.loads(done.stdout)
    ids = np.fromfile(f"{prefix}.bin", "<u2")
    assert report == {
        "prefix": str(prefix),
        "ok": True,
        "problems": [],
        "damage": [],
        "documents": 5,
        "sequences": 5,
        "tokens": len(ids),
        "largest_id": int(ids.max()),
        "empty_documents": 0,
    }
    assert "largest id" in run_program("verify", prefix, "--deep").stdout
