"""The loader benchmark: every contender serves the dataset's own tokens, and the report holds the ratios."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from pretrain.bench.loader import CONTENDERS, app, summarise
from pretrain.bench.loader_contenders import measure
from pretrain.bench.synthetic import document_starts, sentence_lengths, write_corpus
from pretrain.data.dataset.dataset_writer import IndexedDatasetWriter
from pretrain.data.dataset.indexed_dataset import IndexedDataset
from pretrain.data.dataset.verification import verify
from pretrain.errors import DataError


def test_synthetic_corpus_is_a_sound_dataset_and_a_function_of_its_seed(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    prefix, again = write_corpus(tmp_path, 20_000), write_corpus(tmp_path / "again", 20_000)
    assert verify(prefix) == []
    assert Path(f"{prefix}.bin").read_bytes() == Path(f"{again}.bin").read_bytes()
    dataset = IndexedDataset(prefix)
    assert dataset.num_tokens == pytest.approx(20_000, rel=0.2)
    assert dataset.tokens.min() >= 5
    lengths, starts = sentence_lengths(5000, 1), document_starts(5000, 1)
    assert 20 < lengths.mean() < 32
    assert starts[0] == 0
    assert starts[-1] == 5000
    assert np.all(np.diff(starts) > 0)


@pytest.mark.parametrize("contender", ["taco", "taco-whole-word"])
def test_our_rows_equal_the_documents_in_plain_python(tmp_path: Path, contender: str) -> None:
    prefix = str(write_corpus(tmp_path, 20_000))
    found = measure(contender, prefix, tmp_path, 64, 4, 0.0)
    assert found["is_equal"] is True
    assert found["seconds_per_row"] >= 0


def test_report_compares_medians_of_the_same_run() -> None:
    seconds = {"taco": 4e-6, "taco-whole-word": 5e-6, "taco-tensors": 6e-6}
    seconds |= {"megatron": 5e-3, "huggingface": 4e-4, "memory": 2e-7}
    runs = {
        name: [{"seconds_per_row": value * share, "is_equal": True, "versions": {}} for share in (1, 3, 0.5)]
        for name, value in seconds.items()
    }
    report = summarise({"seq_length": 512}, runs)
    assert report["ratios"]["megatron_over_whole_word"] == pytest.approx(1000)
    assert report["ratios"]["huggingface_over_taco"] == pytest.approx(100)
    assert report["feeds_8_a100_per_core"]["taco"] == pytest.approx(250_000 / 720)
    assert summarise({"seq_length": 100}, runs)["feeds_8_a100_per_core"] is None


def test_data_that_a_peer_cannot_read_is_refused_before_any_ratio(tmp_path: Path) -> None:
    prefix = tmp_path / "documents"
    corpus = write_corpus(tmp_path, 20_000)
    info = IndexedDataset(corpus).manifest.tokenizer
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        writer.add_documents(np.full(90, 7), np.array([40, 50]))
        writer.finalize(tokenizer=info)
    shutil.copytree(f"{corpus}.tokenizer", f"{prefix}.tokenizer")
    answer = CliRunner().invoke(app, ["--quick", "--prefix", str(prefix)])
    assert isinstance(answer.exception, DataError)
    assert "2 sequences in 2 documents" in str(answer.exception)
    assert "--split-sentences" in str(answer.exception)
    assert "us per row" not in answer.output


@pytest.mark.soak
def test_every_contender_serves_the_same_tokens(tmp_path: Path) -> None:
    out = tmp_path / "loader.json"
    answer = CliRunner().invoke(app, ["--quick", "--json", "--out", str(out)])
    assert answer.exit_code == 0, answer.output
    report = json.loads(out.read_text())
    assert set(report["is_equal"]) == set(CONTENDERS)
    assert all(report["is_equal"].values())
    assert all(value > 0 for value in report["ratios"].values())
    assert all(value > 0 for value in report["microseconds_per_row"].values())
