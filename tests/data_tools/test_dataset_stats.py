"""Counts are those of a plain count over all tokens, whatever the piece; the picture and the report can be read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from corpora import TEXTS, run_program, write_jsonl, write_vocab
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.dataset_stats import gather
from data_tools.encoding.encode import EncodeOptions
from data_tools.preprocess import preprocess
from data_tools.views import dataset_tally
from data_tools.views.dataset_tally import LengthTally
from data_tools.views.stats_page import describe
from pretrain.data.dataset.dataset_writer import IndexedDatasetWriter
from pretrain.data.dataset.indexed_dataset import IndexedDataset
from pretrain.data.tokenizer.info import SpecialIds, TokenizerInfo
from pretrain.data.tokenizer.load import load_tokenizer
from pretrain.errors import DataError


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    path = write_jsonl(tmp_path / "x.jsonl", [*TEXTS, "a [MASK] is a ☃ \u3053"])
    preprocess([str(path)], EncodeOptions(str(write_vocab(tmp_path))), str(tmp_path / "out"))
    return str(tmp_path / "out")


@pytest.fixture
def write_sentences(tmp_path: Path) -> Callable[[list[list[list[int]]]], str]:
    def write(documents: list[list[list[int]]]) -> str:
        prefix = str(tmp_path / "sentences")
        info = TokenizerInfo("wordpiece", "v", "ab" * 32, 100, False, SpecialIds(0, 1, 2, 3, 4))
        with IndexedDatasetWriter(prefix, "uint16", overwrite=True) as writer:
            for document in documents:
                writer.add_document([np.array(sentence, np.int64) for sentence in document])
            writer.finalize(tokenizer=info)
        return prefix

    return write


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_counts_are_those_of_a_plain_count(prefix: str, monkeypatch: pytest.MonkeyPatch, piece: int):
    monkeypatch.setattr(dataset_tally, "_PIECE", piece)
    (report,) = gather([prefix], 16, 3)
    dataset, tokenizer = IndexedDataset(prefix), load_tokenizer(f"{prefix}.tokenizer")
    lengths = [len(dataset.document(index)) for index in range(len(dataset))]
    counts = Counter(dataset.tokens.tolist())
    assert (report["documents"], report["tokens"]) == (len(lengths), sum(lengths))
    found = report["tokens_per_document"]
    assert (found["min"], found["max"], found["mean"]) == (min(lengths), max(lengths), pytest.approx(np.mean(lengths)))
    assert sum(bar["tokens"] for bar in found["histogram"]) == sum(lengths)
    assert sum(bar["number"] for bar in found["fine_histogram"]) == len(lengths)
    vocabulary = report["vocabulary"]
    special = tokenizer.special
    assert vocabulary["special_tokens"] == {"pad": 0, "unk": counts[special.unk], "cls": 0, "sep": 0, "mask": 1}
    assert counts[special.unk] == 2
    assert vocabulary["unknown_share"] == pytest.approx(2 / sum(lengths))
    assert vocabulary["used"] == len(counts)
    assert vocabulary["used_once"] == sum(count == 1 for count in counts.values())
    best = counts.most_common(1)[0]
    assert (vocabulary["top"][0]["id"], vocabulary["top"][0]["count"]) == best
    assert vocabulary["top"][0]["piece"] == "sat"
    assert vocabulary["top_share"]["1"] == pytest.approx(best[1] / sum(lengths))
    ordinary = {index: count for index, count in counts.items() if index not in tokenizer.special_ids()}
    words = sum(count for index, count in ordinary.items() if not tokenizer.continues_word()[index])
    assert vocabulary["pieces_per_word"] == pytest.approx(sum(ordinary.values()) / words)


def test_rows_are_those_that_training_sees(prefix: str):
    from pretrain.data.batches import RowSource

    (report,) = gather([prefix], 16, 0)
    for mode in ("stream", "document"):
        rows = RowSource([prefix], mode, 16)  # type: ignore[arg-type]
        found = report["rows"]["modes"][mode]
        assert found["rows"] == rows.num_rows
        ids, _ = rows.fill(np.arange(rows.num_rows))
        special = rows.tokenizer.special
        text = (~np.isin(ids, [special.cls, special.sep, special.pad])).sum()
        assert found["text_share"] == pytest.approx(text / ids.size, abs=0.02)
    (report,) = gather([prefix], 100_000, 0)
    assert report["rows"]["modes"]["stream"] == {"rows": 0, "text_share": 0.0, "left_out": report["tokens"]}


@settings(deadline=None)
@given(st.lists(st.integers(0, 200_000) | st.integers(0, 9), min_size=1, max_size=60), st.integers(1, 4))
def test_percentiles_and_bins_are_exact(lengths: list[int], bins: int):
    tally = LengthTally()
    for part in np.array_split(np.array(lengths, np.int64), 3):
        tally.add(part)
    for share in (0, 1, 25, 50, 99, 100):
        expected = np.percentile(lengths, share, method="inverted_cdf")
        assert tally.percentile(share) == expected
    bars = tally.histogram(bins)
    for bar in bars:
        inside = [length for length in lengths if bar.low <= length <= bar.high]
        assert (bar.number, bar.tokens) == (len(inside), sum(inside))
    assert sum(bar.number for bar in bars) == len(lengths)
    assert all(before.high + 1 == after.low for before, after in zip(bars, bars[1:], strict=False))


def test_bins_double():
    tally = LengthTally()
    tally.add(np.arange(20))
    assert [(bar.low, bar.high) for bar in tally.histogram()] == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31)]


def test_the_law_of_zipf_is_recognised():
    tally = dataset_tally.TokenTally(5000)
    tally.counts = (1e9 / np.arange(1, 5001) ** 1.2).astype(np.int64)
    assert tally.zipf_exponent() == pytest.approx(1.2, abs=0.01)
    uniform = dataset_tally.TokenTally(64)
    uniform.counts = np.full(64, 10)
    assert uniform.entropy() == pytest.approx(6.0)
    assert (uniform.ids_for_share(0.5), uniform.top_share(16)) == (32, 0.25)


def test_sentences_are_told_apart_from_documents(write_sentences: Callable[..., str]):
    prefix = write_sentences([[[5, 6, 7], [8]], [[9, 10]], []])
    (report,) = gather([prefix], 8, 2)
    assert report["tokens_per_sequence"]["percentiles"]["50"] == 2
    assert report["tokens_per_document"]["empty"] == 1
    assert "3 sentences, tokens per sentence: mean 2.0, 1 to 3" in describe(report)


def test_a_dataset_without_manifest_or_tokenizer_is_counted_too(write_sentences: Callable[..., str]):
    prefix = write_sentences([[[5, 6, 7]], [[8]]])
    Path(f"{prefix}.json").unlink()
    (report,) = gather([prefix], 8, 5)
    assert (report["tokens"], report["vocabulary"]["used"], report["rows"]["modes"]) == (4, 4, {})
    assert "vocabulary: 4 ids occur" in describe(report)
    empty = write_sentences([[], []])
    assert "0 tokens" in describe(gather([empty], 8, 5)[0])


def test_an_id_outside_the_vocabulary_is_an_error(prefix: str):
    with Path(f"{prefix}.bin").open("r+b") as file:
        file.write(b"\xff\xff")
    with pytest.raises(DataError, match=r"out.bin: token id 65535 between tokens 0 and \d+ is not in a vocabulary"):
        gather([prefix], 16, 3)


@pytest.mark.slow
def test_program_writes_report_and_picture(prefix: str, tmp_path: Path):
    done = run_program("dataset_stats", prefix, prefix, "--plot", tmp_path / "x.png", "--seq-length", "16")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokens per document") == 2
    assert f"picture: {tmp_path / 'x.png'}" in done.stdout
    assert (tmp_path / "x.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    done = run_program("dataset_stats", prefix, "--json")
    assert json.loads(done.stdout)[0]["documents"] == len(TEXTS) + 1
    done = run_program("dataset_stats", prefix, "--plot", tmp_path / "no" / "x.png")
    assert (done.returncode, "cannot be written: No such file" in done.stderr) == (1, True)
