"""`taco data index`: what it reports is what training sees, and its mistakes are one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from project import ROOT, SHARED

from data_tools.build_index import index_dataset
from data_tools.encoding.encode import EncodeOptions
from data_tools.preprocess import preprocess
from pretrain.data.batches import RowSource
from pretrain.data.dataset.dataset_writer import IndexedDatasetWriter
from pretrain.data.dataset.indexed_dataset import IndexedDataset
from pretrain.data.tokenizer.info import SpecialIds, TokenizerInfo


def write(prefix: Path) -> None:
    info = TokenizerInfo("wordpiece", "vocab.txt", "ab" * 32, 100, False, SpecialIds(0, 1, 2, 3, 4))
    generator = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for length in generator.integers(1, 200, 500):
            writer.add_document([np.full(length, 7), np.full(3, 8)])
        writer.finalize(tokenizer=info)


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pretrain.cli", "data", "index", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("mode", ["stream", "document", "pack", "sentence"])
def test_the_report_is_what_training_sees(tmp_path: Path, mode: str) -> None:
    write(tmp_path / "a")
    report = index_dataset(str(tmp_path / "a"), mode, 64)  # type: ignore[arg-type]
    rows = RowSource([tmp_path / "a"], mode, 64)  # type: ignore[arg-type]
    assert (report["rows"], report["tokens"], report["left_out"]) == (rows.num_rows, rows.num_tokens, rows.num_left_out)
    assert report["fill_rate"] == rows.fill_rate
    assert Path(f"{tmp_path / 'a'}.index").exists() == (mode in ("pack", "sentence"))


def test_the_verb_reports_every_split_as_json(tmp_path: Path) -> None:
    write(tmp_path / "a")
    done = call(tmp_path / "a", "--row-mode", "sentence", "--splits", "train=0.8,validation=0.2", "--json")
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout)
    assert [report["split"] for report in reports] == ["train", "validation"]
    assert sum(report["tokens"] for report in reports) == index_dataset(str(tmp_path / "a"), "stream", 64)["tokens"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--row-mode", "packed"], "--row-mode packed: expected one of stream, document, pack, sentence"),
        (["--splits", "train=0.5,test=0.2"], "must be 1, found 0.7"),
        (["--splits", "nonsense"], "--splits nonsense: expected shares such as"),
        (["--seq-length", "70000"], "must be at most 65536 with data.row_mode=pack"),
    ],
)
def test_mistakes_are_explained(tmp_path: Path, arguments: list[str], words: str) -> None:
    write(tmp_path / "a")
    done = call(tmp_path / "a", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared corpora; set TACO_SHARED_DATA")
@pytest.mark.parametrize(
    ("corpus", "vocab", "fill_rate"),
    [
        ("mix_en.train", "bert-base-uncased", 0.994),
        ("ja_aozora", "bert-base-chinese", 0.998),
        ("zh_wiki", "bert-base-chinese", 0.94),  # half of the documents fill more than half a row each
    ],
)
def test_packing_whole_corpora_comes_near_what_is_possible(
    tmp_path: Path, corpus: str, vocab: str, fill_rate: float
) -> None:
    options = EncodeOptions(str(SHARED / "vocab" / vocab / "vocab.txt"))
    preprocess([str(SHARED / "corpus" / f"{corpus}.jsonl.zst")], options, str(tmp_path / "a"))
    report = index_dataset(str(tmp_path / "a"), "pack", 512)
    assert report["fill_rate"] > fill_rate
    lengths = np.diff(IndexedDataset(tmp_path / "a").document_offsets)
    rest = lengths % 510
    pieces = np.concatenate((np.full((lengths // 510).sum(), 512), rest[rest > 0] + 2))
    assert report["rows"] <= 1.003 * least_rows(pieces, 512)


def least_rows(pieces: np.ndarray, places: int) -> int:
    """No packing needs fewer rows: the bound L2 of Martello and Toth (1990), "Knapsack Problems", section 8.3."""
    best = -(-int(pieces.sum()) // places)
    for small in range(1, places // 2 + 1):
        alone = pieces > places - small
        large = ~alone & (2 * pieces > places)
        rest = pieces[~alone & ~large & (pieces >= small)].sum() - (places * large.sum() - pieces[large].sum())
        best = max(best, int(alone.sum() + large.sum() + max(0, -(-rest // places))))
    return best
