"""The preprocessing benchmark: every peer's ids are ours, and the report holds what it promises."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import zstandard
from typer.testing import CliRunner

from pretrain.bench.data import LIMITS, OURS, PEERS, app, prepare_corpus, summarise
from pretrain.bench.data_contenders import Job, measure
from pretrain.data.tokenizer.sentencepiece_model import train_sentencepiece
from pretrain.errors import DataError

TEXTS = ["the cat sat", "a cat and the mat", "café 中文 — the", "sat " * 300]


def write_lines(path: Path, texts: list[str], key: str = "text") -> Path:
    data = "".join(json.dumps({key: text}) + "\n" for text in texts).encode()
    packed = {".zst": zstandard.compress, ".gz": gzip.compress}.get(path.suffix, bytes)
    path.write_bytes(packed(data))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_corpus_is_used_once_and_its_parts_are_its_first_documents(tmp_path: Path, name: str) -> None:
    source = write_lines(tmp_path / name, ["", *TEXTS, "  "])
    folder = tmp_path / "work"
    folder.mkdir()
    sizes = prepare_corpus(folder, source, "text", 60.0)
    lines = [json.loads(line)["text"] for line in (folder / "corpus.jsonl").open(encoding="utf-8")]
    assert lines == TEXTS
    assert sizes["corpus_bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert json.loads((folder / "one_line.jsonl").read_text(encoding="utf-8")) == {"text": TEXTS[0]}


def test_the_sample_is_repeated_until_there_is_enough(tmp_path: Path) -> None:
    sizes = prepare_corpus(tmp_path, None, "text", 6.0)
    assert 6_000_000 <= sizes["corpus_bytes"] < 6_200_000
    assert sizes["small_part_bytes"] < sizes["part_bytes"]


def test_a_corpus_without_text_is_refused(tmp_path: Path) -> None:
    for source in (write_lines(tmp_path / "key", TEXTS, "body"), write_lines(tmp_path / "empty", [""]), Path("none")):
        with pytest.raises(DataError):
            prepare_corpus(tmp_path, source, "text", 1.0)


def write_vocab(path: Path) -> Path:
    letters = [*"abcdefghijklmnopqrstuvwxyz中文—", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", *letters]) + "\n")
    return path


@pytest.mark.slow
def test_our_program_and_the_limits_agree_and_a_false_dataset_is_noticed(tmp_path: Path) -> None:
    prepare_corpus(tmp_path, write_lines(tmp_path / "own.jsonl", TEXTS), "text", 1.0)
    job = Job(tmp_path, str(write_vocab(tmp_path / "vocab.txt")), cased=False)
    for contender in (*OURS, "tokenizers", *LIMITS):
        found = measure(contender, job)
        assert found["is_equal"] in (True, None), contender
        assert found["text_bytes"] == sum(len(text.encode()) for text in TEXTS)
    write_lines(tmp_path / "part.jsonl", [*TEXTS[1:], TEXTS[0]])
    assert measure("tokenizers", job)["is_equal"] is False


@pytest.mark.slow
def test_a_sentencepiece_model_is_held_against_its_library(tmp_path: Path) -> None:
    model = tmp_path / "small.model"
    model.write_bytes(train_sentencepiece(iter(TEXTS * 9), model_type="unigram", vocab_size=40, hard_vocab_limit=False))
    prepare_corpus(tmp_path, write_lines(tmp_path / "own.jsonl", TEXTS), "text", 1.0)
    job = Job(tmp_path, str(model), cased=False)
    for contender in (*OURS, *PEERS[".model"], "limit-tokenize"):
        assert measure(contender, job)["is_equal"] is True, contender


def test_report_compares_work_per_cpu_second() -> None:
    def run(seconds: float, num_bytes: int) -> list[dict]:
        answer = {"start_seconds": 0.3, "text_bytes": num_bytes, "is_equal": True, "peak_bytes": 1, "versions": {}}
        return [{**answer, "seconds": seconds * share} for share in (1, 2, 0.5)]

    report = summarise({}, {"taco": run(1.0, 60_000_000), "megatron": run(4.0, 8_000_000)})
    assert report["megabytes_per_cpu_second"] == {"taco": 60.0, "megatron": 2.0}
    assert report["ratios"] == {"taco_over_megatron": 30.0}


@pytest.mark.soak
def test_every_peer_gives_our_ids(tmp_path: Path) -> None:
    out = tmp_path / "data.json"
    answer = CliRunner().invoke(app, ["--quick", "--json", "--out", str(out)])
    assert answer.exit_code == 0, answer.output
    report = json.loads(out.read_text())
    assert set(report["megabytes_per_cpu_second"]) == {*OURS, *PEERS[".txt"], *LIMITS}
    assert {*OURS, *PEERS[".txt"]} <= set(report["is_equal"])
    assert all(report["is_equal"].values())
    assert all(value > 0 for value in report["ratios"].values())
