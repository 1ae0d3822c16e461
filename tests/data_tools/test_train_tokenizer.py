"""Vocabularies are complete, the same in every run, and load; sizes that do not suit the text are explained."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

import pytest
from corpora import SPECIAL, run_program, write_bytes, write_jsonl
from project import SAMPLE, SHARED

from data_tools.readers import ReadOptions
from data_tools.vocabulary.learn_vocabulary import (
    _lines,
    _without_long_words,
    learn_byte_bpe,
    learn_sentencepiece,
    learn_wordpiece,
)
from data_tools.vocabulary.text_sample import draw_sample
from pretrain.data.tokenizer.load import load_tokenizer
from pretrain.errors import ConfigError, DataError

SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]
WORDS = [SYLLABLES[i * 7 % 60] + SYLLABLES[i * i % 60] + SYLLABLES[i * 13 % 60][: i % 3] for i in range(200)]
TEXTS = [f"The {' '.join(WORDS[i::10])}, Café {WORDS[i]}ing unable{WORDS[i]}ly!" for i in range(10)] * 2
KINDS = [("wordpiece", "txt", 70), ("bpe", "json", 300), ("sentencepiece-unigram", "model", 70)]
KINDS += [("sentencepiece-bpe", "model", 70)]


@pytest.mark.parametrize("cased", [False, True])
def test_wordpiece_vocabulary(tmp_path: Path, cased: bool):
    (tmp_path / "vocab.txt").write_bytes(learn_wordpiece(TEXTS, 100, cased))
    pieces = (tmp_path / "vocab.txt").read_text(encoding="utf-8").split("\n")[:-1]
    assert pieces[:5] == SPECIAL
    assert len(pieces) == len(set(pieces)) == 100
    assert ("T" in pieces) == cased
    assert ("é" in pieces or "##é" in pieces) == cased
    assert "," in pieces
    assert "##," not in pieces
    tokenizer = load_tokenizer(tmp_path / "vocab.txt", cased=cased)
    assert all(tokenizer.special.unk not in ids for ids in tokenizer.encode_batch(TEXTS))


@pytest.mark.parametrize("cased", [False, True])
def test_byte_level_bpe_knows_every_text(tmp_path: Path, cased: bool):
    (tmp_path / "bpe.json").write_bytes(learn_byte_bpe(TEXTS, 400, cased))
    tokenizer = load_tokenizer(tmp_path / "bpe.json")
    assert (tokenizer.vocab_size, tokenizer.special_ids(), tokenizer.info.cased) == (400, [0, 1, 2, 3, 4], cased)
    for text in [*TEXTS, "Ωμέγα 中文\n\U0001f600\x00 cafe\u0301", " two  blanks "]:
        kept = unicodedata.normalize("NFC", text)
        assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == (kept if cased else kept.lower())
    assert len(tokenizer.encode_batch([TEXTS[0]])[0]) < len(TEXTS[0].encode()) / 2
    with pytest.raises(ConfigError, match="--vocab-size 260: bpe needs 261"):
        learn_byte_bpe(TEXTS, 260, cased)


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
@pytest.mark.parametrize("cased", [False, True])
def test_sentencepiece_model(tmp_path: Path, algorithm: str, cased: bool):
    (tmp_path / "x.model").write_bytes(learn_sentencepiece(TEXTS, 60, cased, algorithm))
    tokenizer = load_tokenizer(tmp_path / "x.model")
    assert (tokenizer.vocab_size, tokenizer.special_ids(), tokenizer.info.cased) == (60, [0, 1, 2, 3, 4], cased)
    same_case = tokenizer.encode_batch(["THE CATS"]) == tokenizer.encode_batch(["the cats"])
    assert same_case != cased
    tokenizer.save_pretrained(tmp_path / "saved")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "suffix", "size"), KINDS)
def test_every_run_gives_the_same_file(tmp_path: Path, kind: str, suffix: str, size: int):
    path, found = write_jsonl(tmp_path / "x.jsonl", TEXTS), set()
    for number in range(2):
        output = tmp_path / f"{number}.{suffix}"
        done = run_program(
            "train_tokenizer", "--input", path, "--output", output, "--vocab-size", size, "--kind", kind, "--json"
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        report = json.loads(done.stdout)
        assert (report["vocab_size"], report["kind"]) == (size, kind)
        assert (report["documents"], report["is_whole_corpus"]) == (20, True)
        assert (report["unknown_share"] > 0) == (kind == "wordpiece"), "half of 70 pieces are too few for the letters"
        assert report["bytes"] == sum(len(text.encode()) for text in TEXTS)
        assert 1 < report["bytes_per_token"] < 10
        found.add(output.read_bytes())
    assert len(found) == 1
    assert sorted(item.name for item in tmp_path.iterdir()) == [*(f"{i}.{suffix}" for i in range(2)), "x.jsonl"]


def test_rare_characters_leave_room_for_pieces():
    texts = [*TEXTS, "".join(map(chr, range(0x4E00, 0x4F00)))]
    pieces = learn_wordpiece(texts, 80, False).decode().split("\n")
    assert sum("\u4e00" <= piece[:1] <= "\u9fff" for piece in pieces) < 20
    assert sum(len(piece.removeprefix("##")) > 1 for piece in pieces[5:]) > 30


def test_ideographs_may_fill_the_vocabulary():
    """Each is a word, so merges need no room; what they leave goes to rarer characters."""
    ideographs = [chr(0x4E00 + i) for i in range(100)]
    texts = ["".join(ideographs[: 100 - i]) for i in range(100)] + ["abc abc abd"]
    pieces = learn_wordpiece(texts, 105, False).decode().split("\n")[:-1]
    assert len(pieces) == len(set(pieces)) == 105
    assert sum(piece in ideographs for piece in pieces) > 85
    assert set(ideographs[:80]) < set(pieces)


def test_sizes_that_do_not_suit_the_text_are_explained():
    for learn in (learn_wordpiece, learn_byte_bpe):
        with pytest.raises(DataError, match=r"this text gives \d+ pieces, not 9000; ask for --vocab-size \d+ or fewer"):
            learn(TEXTS, 9000, False)
    for algorithm in ("unigram", "bpe"):
        with pytest.raises(DataError, match=r"vocab size 9000 is too large for it; ask for --vocab-size \d+ or fewer"):
            learn_sentencepiece(TEXTS, 9000, False, algorithm)
        with pytest.raises(DataError, match=r"vocab size 9 has no room .* --vocab-size \d+ or more"):
            learn_sentencepiece(TEXTS, 9, False, algorithm)


@pytest.mark.parametrize(
    ("kind", "asked"),
    [("wordpiece", 9000), ("bpe", 9000), ("bpe", 10)]
    + [(f"sentencepiece {x}", n) for x in ("unigram", "bpe") for n in (9000, 10)],
)
def test_the_size_that_a_message_names_works_at_once(kind: str, asked: int):
    texts = ["[MASK] [CLS] hello [SEP] <pad> ▁▁under ## ##ing ###"] * 30 + ["the cat sat on a mat"] * 3

    def learn(size: int) -> bytes:
        if kind in ("wordpiece", "bpe"):
            return (learn_wordpiece if kind == "wordpiece" else learn_byte_bpe)(texts, size, False)
        return learn_sentencepiece(texts, size, False, kind.split()[-1])

    with pytest.raises((DataError, ConfigError)) as caught:
        learn(asked)
    named = re.search(r"--vocab-size (\d+) or|needs (\d+) or more", str(caught.value))
    assert named is not None, str(caught.value)
    assert learn(int(named[1] or named[2]))


def test_a_text_too_small_for_any_vocabulary_is_no_riddle():
    for learn in (
        lambda: learn_wordpiece(["a"], 400, False),
        lambda: learn_sentencepiece(["a"], 400, False, "unigram"),
    ):
        with pytest.raises(DataError, match=r"^[^;]*; give more text"):
            learn()


def test_text_without_words_is_an_error():
    for texts in ([" "], ["\x07"], []):
        with pytest.raises(DataError, match="no word"):
            learn_wordpiece(texts, 90, False)
        with pytest.raises(DataError, match="no sentence"):
            learn_sentencepiece(texts, 90, False, "bpe")
    with pytest.raises(DataError, match="no word"):
        learn_byte_bpe([" "], 300, False)


def test_long_lines_are_cut_and_nothing_is_lost():
    texts = ["the cat sat " * 2000, "x" * 9001, "short\n\nlines"]
    lines = list(_lines(texts))
    assert max(map(len, lines)) <= 4000
    assert "".join(lines) == "".join(texts).replace("\n", "")
    assert all(not line.endswith("th") for line in lines)


def test_long_words_are_cut_and_nothing_is_lost():
    texts = ["a " + "x" * 3500 + " b " + "y" * 1000 + "\n" + "z" * 1001, "short"]
    parts = list(_without_long_words(texts))
    assert "".join(parts) == "".join(texts)
    assert max(len(word) for part in parts for word in part.split()) == 1000
    assert len(parts) == 3 + 1 + 1 + 1


def sample(path: Path, **options: object) -> list[str]:
    return draw_sample([str(path)], ReadOptions(), **options).texts  # type: ignore[arg-type]


def test_sample_is_the_same_in_whatever_order(tmp_path: Path):
    texts = [f"text {i} " + "x" * (i % 50) for i in range(2000)]
    path = write_jsonl(tmp_path / "x.jsonl", texts)
    turned = write_jsonl(tmp_path / "y.jsonl.zst", texts[::-1])
    for options in ({"sample_bytes": 5000}, {"max_documents": 77}, {"sample_bytes": 5000, "max_documents": 20}):
        chosen = sample(path, **options)
        assert chosen == sorted(chosen, key=texts.index)
        assert sample(turned, **options) == chosen[::-1]
        assert sum(map(len, chosen)) <= 5000 or "sample_bytes" not in options
        assert len(chosen) <= options.get("max_documents", 2000)
        assert 0.3 < sum(map(texts.index, chosen)) / len(chosen) / 2000 < 0.7, "not the first ones"
    assert len(sample(path, sample_bytes=5000)) > 130
    assert len(sample(path, max_documents=77)) == 77
    # Who asks for less gets some of it, with nothing else.
    assert set(sample(path, sample_bytes=2000)) < set(sample(path, sample_bytes=5000))
    assert sample(path, sample_bytes=1) == sample(path, max_documents=1)
    assert sample(path) == texts


def test_sample_counts_what_it_read(tmp_path: Path):
    path = write_bytes(tmp_path / "x.jsonl", b'{"text": "one"}\n{"text": \n{"text": "three"}\n')
    with pytest.raises(DataError, match="x.jsonl:2: "):
        sample(path)
    found = draw_sample([str(path)], ReadOptions(on_error="skip"), max_documents=1)
    assert (found.read_documents, found.rejects, found.is_whole, len(found.texts)) == (2, 1, False, 1)
    assert found.num_bytes == len(found.texts[0])


def test_of_a_large_corpus_only_a_share_is_looked_at(tmp_path: Path):
    path = write_jsonl(tmp_path / "x.jsonl", [f"document {i}" for i in range(60_000)])
    options = ReadOptions(chunk_bytes=1000)
    found = draw_sample([str(path)], options, sample_bytes=1000)
    assert found == draw_sample([str(path)], options, sample_bytes=1000)
    assert 900 < found.num_bytes <= 1000
    assert 2000 < found.read_documents < 20_000
    assert not found.is_whole


def test_hash_ranges_divide_the_corpus(tmp_path: Path):
    from data_tools.encoding.encode import parse_hash_range

    path = write_jsonl(tmp_path / "x.jsonl", TEXTS[:10])
    some, rest = (sample(path, hash_range=parse_hash_range(bounds)) for bounds in ("0:0.5", "0.5:1"))
    assert sorted(some + rest) == sorted(TEXTS[:10])
    assert some
    assert rest
    assert sample(path, max_documents=len(some)) == some


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--output", "x.model"], 2, ["x.model", ".txt"]),
        (["--output", "x.txt", "--kind", "sentencepiece-bpe"], 2, ["x.txt", ".model"]),
        (["--output", "x.txt", "--kind", "bpe"], 2, ["x.txt", ".json"]),
        (["--output", "x.txt", "--kind", "wordpieces"], 2, ["wordpiece"]),
        (["--output", "x.txt", "--sample-bytes", "many"], 2, ["--sample-bytes many", "512M"]),
        (["--output", "x.txt", "--max-documents", "0"], 2, ["max-documents"]),
        (["--output", "x.txt", "--vocab-size", "9000"], 1, ["x.jsonl: this text gives"]),
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
    assert (tmp_path / "there.txt").read_text() == "mine"


@pytest.mark.slow
def test_sample_corpus_vocabulary():
    texts = draw_sample([str(SAMPLE)], ReadOptions()).texts
    pieces = learn_wordpiece(texts, 8000, False).decode().split("\n")
    assert {"the", "of", "gentleman", "##ing"} <= set(pieces)


@pytest.mark.slow
@pytest.mark.parametrize("language", ["zh_wiki", "ja_aozora"])
@pytest.mark.parametrize(("kind", "suffix", "size"), KINDS)
def test_chinese_and_japanese(tmp_path: Path, language: str, kind: str, suffix: str, size: int):
    path = SHARED / "corpus" / f"{language}.jsonl.zst"
    if not path.exists():
        pytest.skip("no shared corpora; set TACO_SHARED_DATA")
    output = tmp_path / f"x.{suffix}"
    arguments = ["--vocab-size", 4000, "--kind", kind, "--sample-bytes", "500K", "--json", "--cased"]
    done = run_program("train_tokenizer", "--input", path, "--output", output, *arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["unknown_share"] < 0.01
    tokenizer = load_tokenizer(output, cased=True)
    for text in draw_sample([str(path)], ReadOptions(), sample_bytes=10_000).texts:
        ids = tokenizer.encode_batch([text])[0]
        kept = "".join(unicodedata.normalize("NFKC", tokenizer.decode(ids)).replace("##", "").split())
        lost = ids.count(tokenizer.special.unk)
        assert lost > 0 or kept == "".join(unicodedata.normalize("NFKC", text).split())
