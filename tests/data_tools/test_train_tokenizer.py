"""Vocabularies are complete, the same in every run, and load; sizes that do not suit the text are explained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from corpora import SAMPLE, SPECIAL, run_program, write_bytes, write_jsonl

from data_tools.encode import parse_hash_range
from data_tools.train_tokenizer import Corpus, _lines, learn_sentencepiece, learn_wordpiece
from pretrain.data.tokenizer import load_tokenizer
from pretrain.errors import DataError

SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]
WORDS = [SYLLABLES[i * 7 % 60] + SYLLABLES[i * i % 60] + SYLLABLES[i * 13 % 60][: i % 3] for i in range(200)]
TEXTS = [f"The {' '.join(WORDS[i::10])}, Café {WORDS[i]}ing unable{WORDS[i]}ly!" for i in range(10)] * 2


def corpus(
    folder: Path, texts: list[str] | None = None, hash_range: str = "0:1", max_bytes: int | None = None
) -> Corpus:
    path = write_jsonl(folder / "x.jsonl", TEXTS if texts is None else texts)
    return Corpus([str(path)], "text", parse_hash_range(hash_range), max_bytes)


@pytest.mark.parametrize("cased", [False, True])
def test_wordpiece_vocabulary(tmp_path: Path, cased: bool):
    (tmp_path / "vocab.txt").write_bytes(learn_wordpiece(corpus(tmp_path), 100, cased))
    pieces = (tmp_path / "vocab.txt").read_text(encoding="utf-8").split("\n")[:-1]
    assert pieces[:5] == SPECIAL
    assert len(pieces) == len(set(pieces)) == 100
    assert ("T" in pieces) == cased
    assert ("é" in pieces or "##é" in pieces) == cased
    assert "," in pieces
    assert "##," not in pieces
    tokenizer = load_tokenizer(tmp_path / "vocab.txt", cased=cased)
    assert all(tokenizer.special.unk not in ids for ids in tokenizer.encode_batch(TEXTS))


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
@pytest.mark.parametrize("cased", [False, True])
def test_sentencepiece_model(tmp_path: Path, algorithm: str, cased: bool):
    (tmp_path / "x.model").write_bytes(learn_sentencepiece(corpus(tmp_path), 60, cased, algorithm))
    tokenizer = load_tokenizer(tmp_path / "x.model")
    assert (tokenizer.vocab_size, tokenizer.special_ids(), tokenizer.info.cased) == (60, [0, 1, 2, 3, 4], cased)
    same_case = tokenizer.encode_batch(["THE CATS"]) == tokenizer.encode_batch(["the cats"])
    assert same_case != cased
    tokenizer.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    ("kind", "suffix"), [("wordpiece", "txt"), ("sentencepiece-unigram", "model"), ("sentencepiece-bpe", "model")]
)
def test_every_run_gives_the_same_file(tmp_path: Path, kind: str, suffix: str):
    path, found = write_jsonl(tmp_path / "x.jsonl", TEXTS), set()
    for number in range(3):
        output = tmp_path / f"{number}.{suffix}"
        done = run_program(
            "train_tokenizer", "--input", path, "--output", output, "--vocab-size", 70, "--kind", kind, "--json"
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        report = json.loads(done.stdout)
        assert (report["vocab_size"], report["kind"]) == (70, kind)
        found.add(output.read_bytes())
    assert len(found) == 1


def test_rare_characters_leave_room_for_pieces(tmp_path: Path):
    texts = [*TEXTS, "".join(map(chr, range(0x4E00, 0x4F00)))]
    pieces = learn_wordpiece(corpus(tmp_path, texts), 80, False).decode().split("\n")
    assert sum("\u4e00" <= piece[:1] <= "\u9fff" for piece in pieces) < 20
    assert sum(len(piece.removeprefix("##")) > 1 for piece in pieces[5:]) > 30


def test_sizes_that_do_not_suit_the_text_are_explained(tmp_path: Path):
    with pytest.raises(
        DataError, match=r"x.jsonl: this text gives \d+ pieces, not 9000; ask for --vocab-size \d+ or fewer"
    ):
        learn_wordpiece(corpus(tmp_path), 9000, False)
    for algorithm in ("unigram", "bpe"):
        with pytest.raises(DataError, match=r"vocab size 9000 is too large for it; ask for --vocab-size \d+ or fewer"):
            learn_sentencepiece(corpus(tmp_path), 9000, False, algorithm)
        with pytest.raises(DataError, match=r"vocab size 9 has no room .* --vocab-size \d+ or more"):
            learn_sentencepiece(corpus(tmp_path), 9, False, algorithm)


def test_text_without_words_and_damaged_text_are_errors(tmp_path: Path):
    for texts in ([" "], ["\x07"]):
        with pytest.raises(DataError, match="no word"):
            learn_wordpiece(corpus(tmp_path, texts), 90, False)
        with pytest.raises(DataError, match="no sentence"):
            learn_sentencepiece(corpus(tmp_path, texts), 90, False, "bpe")
    path = write_bytes(tmp_path / "x.jsonl", b'{"text": "a cat"}\n{"text": \n')
    damaged = Corpus([str(path)], "text", parse_hash_range("0:1"), None)
    with pytest.raises(DataError, match="x.jsonl:2: broken JSON"):
        learn_wordpiece(damaged, 90, False)
    with pytest.raises(DataError, match="x.jsonl:2: broken JSON"):
        learn_sentencepiece(damaged, 90, False, "unigram")


def test_long_lines_are_cut_and_nothing_is_lost(tmp_path: Path):
    texts = ["the cat sat " * 2000, "x" * 9001, "short\n\nlines"]
    lines = list(_lines(corpus(tmp_path, texts)))
    assert max(map(len, lines)) <= 4000
    assert "".join(lines) == "".join(texts).replace("\n", "")
    assert all(not line.endswith("th") for line in lines)


def test_sample_is_taken_by_hash_and_bytes(tmp_path: Path):
    some = list(corpus(tmp_path, hash_range="0:0.5").texts("x"))
    rest = list(corpus(tmp_path, hash_range="0.5:1").texts("x"))
    assert sorted(some + rest) == sorted(TEXTS)
    assert some
    assert rest
    assert list(corpus(tmp_path, max_bytes=200).texts("x")) == TEXTS[:2]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--output", "x.model"], 2, ["x.model", ".txt"]),
        (["--output", "x.txt", "--kind", "sentencepiece-bpe"], 2, ["x.txt", ".model"]),
        (["--output", "x.txt", "--kind", "wordpieces"], 2, ["wordpiece"]),
        (["--output", "there.txt"], 1, ["there.txt", "exists already", "--overwrite"]),
        (["--output", "x.jsonl/v.txt", "--vocab-size", "60"], 1, ["cannot be written"]),
    ],
)
def test_mistakes_are_one_line_and_an_exit_code(tmp_path: Path, arguments: list[str], code: int, words: list[str]):
    write_jsonl(tmp_path / "x.jsonl", TEXTS)
    (tmp_path / "there.txt").write_text("mine")
    size = [] if "--vocab-size" in arguments else ["--vocab-size", "60"]
    done = run_program("train_tokenizer", "--input", "x.jsonl", *arguments, *size, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there.txt", "x.jsonl"]


@pytest.mark.slow
def test_sample_corpus_vocabulary(tmp_path: Path):
    pieces = (
        learn_wordpiece(Corpus([str(SAMPLE)], "text", parse_hash_range("0:1"), None), 8000, False).decode().split("\n")
    )
    assert {"the", "of", "gentleman", "##ing"} <= set(pieces)
