"""Long texts are encoded in parts, with the ids of the whole, by every kind of tokenizer that a library runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from project import SAMPLE
from read_texts import texts_of

from data_tools.vocabulary.learn_vocabulary import learn_byte_bpe
from pretrain.data.tokenizer import long_texts
from pretrain.data.tokenizer.load import load_tokenizer, train_sentencepiece
from pretrain.data.tokenizer.long_texts import cut_long

PART = 3000
PLAIN = {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc_cf"}
SENTENCEPIECE = {
    "unigram": PLAIN,
    "bpe": PLAIN | {"model_type": "bpe"},
    "keeps blanks": PLAIN | {"remove_extra_whitespaces": False, "normalization_rule_name": "identity"},
    "no prefix": PLAIN | {"add_dummy_prefix": False},
    "joins words": PLAIN | {"split_by_whitespace": False},
}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    texts = texts_of(SAMPLE)[:40]
    mixed = " ".join(texts[:12]).replace(". ", ".\n\n  ").replace(", ", ",\u3000\t")
    return ["short", " ".join(texts)[:60_000], mixed[:20_000], "中文的句子。第二个句子！" * 900, "x" * 9000, ""]


def tokenizer_file(folder: Path, kind: str, texts: Sequence[str]) -> Path:
    if kind in SENTENCEPIECE:
        lines = iter([line[:2000] for text in texts for line in text.split("\n")])
        (folder / "t.model").write_bytes(train_sentencepiece(lines, vocab_size=400, **SENTENCEPIECE[kind]))
        return folder / "t.model"
    fields = json.loads(learn_byte_bpe(texts, 500, cased=True))
    if kind == "strips":
        fields["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    (folder / "t.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder / "t.json"


@pytest.mark.parametrize("kind", [*SENTENCEPIECE, "bytes", "strips"])
def test_parts_give_the_ids_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], kind: str
) -> None:
    tokenizer = load_tokenizer(tokenizer_file(tmp_path, kind, texts))
    ids, lengths = tokenizer.encode(texts)
    monkeypatch.setattr(long_texts, "PART_CHARACTERS", PART)
    in_parts, lengths_in_parts = tokenizer.encode(texts)
    assert in_parts.tolist() == ids.tolist()
    assert lengths_in_parts.tolist() == lengths.tolist()


def test_a_text_is_cut_where_words_begin_and_stays_whole_where_they_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "PART_CHARACTERS", PART)

    def words(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = [[hash(word) for word in text.split()] for text in texts]
        return np.array(sum(ids, [])), np.array(list(map(len, ids)))

    def one_id(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return np.array([hash(text) for text in texts]), np.ones(len(texts), np.int64)

    text = "the cat sat " * 1000
    parts = list(cut_long(text, words))
    assert "".join(parts) == text
    assert max(map(len, parts)) < PART + 10
    assert list(cut_long(text, one_id)) == [text]
    assert list(cut_long("x" * 10_000, words)) == ["x" * 10_000]
