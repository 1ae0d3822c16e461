"""Texts and vocabularies of several languages: the shared ones where a machine has them, free stand-ins elsewhere.

The stand-in for English is the sample corpus of this project. Those for Chinese and Japanese are invented: random
characters, in sentences with the punctuation, numbers and foreign words of such texts. They mean nothing, which no
splitter or tokenizer minds.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import zstandard
from project import SAMPLE, SHARED

from data_tools.vocabulary.learn_vocabulary import learn_sentencepiece, learn_wordpiece

CORPORA = ("mix_en.valid", "zh_wiki", "ja_aozora")
SENTENCEPIECE_MODELS = ("30k-clean", "test_model", "test_ja_model", "spiece")
_HAN = [chr(code) for code in range(0x4E00, 0x5A00, 5)]
_KANA = [chr(code) for code in (*range(0x3042, 0x3094), *range(0x30A2, 0x30F5))]
_FOREIGN = ("1984", "BERT", "café", "３．１４", "ﾃｽﾄ", "2,000", "Ω")


def corpus_path(name: str) -> Path | None:
    """The shared corpus of this name, where there is one."""
    path = SHARED / "corpus" / f"{name}.jsonl.zst"
    return path if path.exists() else None


def read_corpus(path: Path) -> Iterator[str]:
    """The texts of a Zstandard file of JSON lines."""
    with path.open("rb") as file:
        for line in io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="utf-8", newline="\n"):
            yield json.loads(line)["text"]


@cache
def texts_of(name: str) -> list[str]:
    """All texts of a corpus of `CORPORA`, or of its stand-in."""
    path = corpus_path(name)
    if path is not None:
        return list(read_corpus(path))
    if name.startswith("mix_en"):
        return list(read_corpus(SAMPLE))[::4]
    return _invent(_HAN if name.startswith("zh") else _HAN + 4 * _KANA, seed=len(name))


def _invent(characters: list[str], seed: int) -> list[str]:
    draw = random.Random(seed)

    def sentence() -> str:
        words = ["".join(draw.choices(characters, k=draw.randint(1, 9))) for _ in range(draw.randint(1, 12))]
        words.insert(draw.randrange(len(words) + 1), draw.choice(("", "", "", *_FOREIGN)))
        spoken = draw.choice(("、", "", "「")).join(words)
        return spoken + "」" * spoken.count("「") + draw.choice("。。。！？")

    def text() -> str:
        return "".join(sentence() + draw.choice(("", "", "\n\n")) for _ in range(draw.randint(20, 120)))

    return [text() for _ in range(150)]


def vocabulary(name: str, folder: Path) -> Path:
    """The published WordPiece vocabulary `name`, or one of its language that is learned into `folder`."""
    shared = SHARED / "vocab" / name / "vocab.txt"
    if shared.exists():
        return shared
    # Invented text repeats few combinations of characters, so it gives few pieces.
    corpus, num_pieces = ("zh_wiki", 600) if "chinese" in name else ("mix_en.valid", 6000)
    path = folder / f"{name}.txt"
    if not path.exists():
        path.write_bytes(learn_wordpiece(texts_of(corpus), num_pieces, cased=False))
    return path


def sentencepiece_model(name: str, folder: Path) -> Path:
    """The published SentencePiece model `name`, or one that is learned into `folder`."""
    shared = next((SHARED / "vocab").glob(f"*/{name}.model"), None)
    if shared is not None:
        return shared
    corpus = "ja_aozora" if "ja" in name else "mix_en.valid"
    path = folder / f"{name}.model"
    if not path.exists():
        algorithm = "bpe" if name == "spiece" else "unigram"
        path.write_bytes(learn_sentencepiece(texts_of(corpus), 2500, cased=False, algorithm=algorithm))
    return path
