"""Sentences, cleaning, limits and duplicates: the dataset of each option against a few lines of plain Python."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from corpora import write_jsonl, write_vocab

from data_tools.encoding.cleaning import CleaningOptions
from data_tools.encoding.encode import EncodeOptions
from data_tools.preprocess import Report, preprocess
from data_tools.readers import ReadOptions
from pretrain.data.dataset.indexed_dataset import IndexedDataset
from pretrain.data.dataset.manifest import Dropped
from pretrain.data.dataset.verification import verify
from pretrain.data.sentences import split_sentences
from pretrain.data.tokenizer.load import load_tokenizer


def make_texts(count: int = 120) -> list[str]:
    maker = random.Random(8)
    words = ["The", "cat", "sat.", "A", "mat!", "And", "café", "中文。", "\x07"]
    return [" ".join(maker.choices(words, k=maker.randrange(0, 30))) for _ in range(count)]


def run(folder: Path, texts: list[str], name: str = "out", dedup: bool = False, **options: Any) -> tuple[Report, Any]:
    path = write_jsonl(folder / "x.jsonl", texts)
    encoding = EncodeOptions(
        str(write_vocab(folder)), reading=ReadOptions(chunk_bytes=700), cleaning=CleaningOptions(**options)
    )
    report = preprocess([str(path)], encoding, str(folder / name), dedup=dedup)
    assert verify(folder / name) == []
    return report, IndexedDataset(folder / name)


def ids_of(folder: Path, texts: list[str]) -> list[list[int]]:
    return load_tokenizer(folder / "vocab.txt").encode_batch(texts)


def documents_of(dataset: IndexedDataset) -> list[list[int]]:
    return [dataset.document(i).tolist() for i in range(len(dataset))]


@pytest.mark.parametrize("limit", [0, 9])
def test_sentences_are_sequences_of_their_document(tmp_path: Path, limit: int) -> None:
    texts = make_texts()
    report, dataset = run(tmp_path, texts, split_sentences=True, min_tokens=limit)
    expected = []
    for text in texts:
        sentences = [ids for ids in ids_of(tmp_path, split_sentences([text])[0]) if ids]
        if sentences and sum(map(len, sentences)) >= limit:
            expected.append(sentences)
    assert max(map(len, expected)) > 2
    ends = dataset.document_indices.tolist()
    assert [end - first for first, end in zip(ends, ends[1:], strict=False)] == list(map(len, expected))
    assert dataset.sequence_lengths.tolist() == [len(ids) for document in expected for ids in document]
    assert documents_of(dataset) == [[i for ids in document for i in ids] for document in expected]
    assert (report.documents, report.sequences) == (len(expected), sum(map(len, expected)))


def test_limits_drop_and_count(tmp_path: Path) -> None:
    texts = make_texts()
    report, dataset = run(tmp_path, texts, min_chars=20, max_chars=100, min_tokens=8, max_tokens=20)
    kept, dropped = [], {reason: [0, 0, 0] for reason in ("empty", "too_short", "too_long", "no_tokens")}
    dropped |= {"too_few_tokens": [0, 0, 0], "too_many_tokens": [0, 0, 0]}
    for text, ids in zip(texts, ids_of(tmp_path, texts), strict=True):
        reason, tokens = "", 0
        if not text.strip():
            reason = "empty"
        elif not 20 <= len(text) <= 100:
            reason = "too_short" if len(text) < 20 else "too_long"
        elif not 8 <= len(ids) <= 20:
            reason, tokens = (
                "no_tokens" if not ids else "too_few_tokens" if len(ids) < 8 else "too_many_tokens",
                len(ids),
            )
        else:
            kept.append(ids)
            continue
        dropped[reason] = [a + b for a, b in zip(dropped[reason], (1, tokens, len(text.encode())), strict=True)]
    assert documents_of(dataset) == kept
    assert report.dropped == {reason: Dropped(*counts) for reason, counts in sorted(dropped.items()) if counts[0]}
    assert report.documents + sum(item.documents for item in report.dropped.values()) == len(texts)
    assert {"too_short", "too_long", "too_many_tokens"} <= set(report.dropped)


@pytest.mark.parametrize("sentences", [False, True])
def test_duplicates_are_those_of_a_plain_set(tmp_path: Path, sentences: bool) -> None:
    maker = random.Random(1)
    texts = [maker.choice(make_texts(12)).upper() if maker.random() < 0.3 else text for text in make_texts(12) * 9]
    maker.shuffle(texts)
    report, dataset = run(tmp_path, texts, dedup=True, split_sentences=sentences)
    seen: dict[tuple[int, ...], None] = {}
    tokens = 0
    for ids in ids_of(tmp_path, texts):
        tokens += len(ids)
        if ids:
            seen.setdefault(tuple(ids))
    assert documents_of(dataset) == [list(ids) for ids in seen]
    left_out = report.dropped["duplicate"]
    assert left_out.tokens == tokens - dataset.num_tokens
    assert report.documents + sum(item.documents for item in report.dropped.values()) == len(texts)
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.bin", "out.idx", "out.json", "out.tokenizer"]
