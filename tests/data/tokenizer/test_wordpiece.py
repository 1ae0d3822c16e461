"""Our WordPiece gives the ids of the `tokenizers` library: on every code point, on hostile text and on real corpora."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from free_corpora import (
    CORPORA,
    SENTENCEPIECE_MODELS,
    read_corpus,
    sentencepiece_model,
    texts_of,
    vocabulary,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from project import ROOT, SAMPLE, SHARED

from data_tools.vocabulary.learn_vocabulary import learn_byte_bpe
from pretrain.data.native import native
from pretrain.data.tokenizer.load import WORDPIECE_SPECIAL, load_tokenizer, wordpiece_pipeline
from pretrain.data.tokenizer.wordpiece import WordPieceEncoder

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no shared corpora; set TACO_SHARED_DATA")
CODE_POINTS = [*range(0xD800), *range(0xE000, 0x110000)]


def is_busy(code: int) -> bool:
    """Where code points differ from their neighbours; elsewhere a sample will do."""
    return code < 0x32000 or 0xE0000 <= code < 0xE0200 or code % 97 == 0


def pieces_of(characters: list[str]) -> list[str]:
    """A vocabulary in which the order of characters shows in the ids."""
    words = ["the", "cat", "un", "##able", "##s", "abcdefgh", "##ijklmnop", "##q"]
    single = dict.fromkeys(character for character in characters if character not in "\n")
    return [*WORDPIECE_SPECIAL, *words, *single, *(f"##{character}" for character in single)]


class Pair:
    """Our encoder and the library's pipeline over the same vocabulary."""

    def __init__(self, pieces: list[str], *, cased: bool) -> None:
        vocab = {piece: index for index, piece in enumerate(pieces)}
        dtype = np.dtype("<u2" if len(vocab) < 65_500 else "<i4")
        self.ours = WordPieceEncoder(vocab, {token: vocab[token] for token in WORDPIECE_SPECIAL}, dtype, cased=cased)
        self.library = wordpiece_pipeline(vocab, cased)

    def assert_equal(self, texts: list[str]) -> None:
        ids, lengths = self.ours.encode(texts)
        expected = [item.ids for item in self.library.encode_batch_fast(texts, add_special_tokens=False)]
        if np.concatenate([*expected, []]).tolist() != ids.tolist() or lengths.tolist() != [*map(len, expected)]:
            found = np.split(ids, lengths.cumsum()[:-1])
            number = next(i for i, item in enumerate(expected) if found[i].tolist() != item)
            assert found[number].tolist() == expected[number], repr(texts[number][:1000])


def pair_of(path: Path, *, cased: bool = False) -> Pair:
    return Pair(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"), cased=cased)


# -- hostile text ------------------------------------------------------------------------------------------------------

# Marks that stay in uncased text, barriers between marks, accents of many classes, what decomposes to several.
MARKS = (
    "\u302e\u302f\u1baa\u1bf2\ua953\ua9c0\U0001d165\U0001d16d\U0001d16e\U0001d15e\U0001d160\U0001d1bd\u08d4\u08e1"
    "\U0001e94a\U0001e944\U00011442\U00011446\u0301\u0327\u0345\u0344\u0f73\u093f\u0941\u094d\u0c48\u034f\u3099\u20dd"
)
SPELLING = "aeAEzZ09ÉßİıſﬁΣςσǅŉΐ가힣각\u1100\u1161\u11a8中豈ガｶﾞかЖй\u1e9b\u0130ⅣΩK🄰𝐀👩🇩"
BREAKING = " \t\r\n\x00\x0b\x0c\x1c\x7f\x85\xa0\xad\u180e\u200b\u200d\u2028\u2029\u202f\u205f\u3000\ufeff\ufffd\ue000"
PUNCTUATION = "[]#'-.,~$^`|<=>+\u037e\u0387\u1fef\u2260\u2329¡«·„“”…—、。・〜｡！\U00010100"
POOL = sorted({*MARKS, *SPELLING, *BREAKING, *PUNCTUATION, *map(chr, range(0x20, 0x7F))})
HOSTILE = st.lists(
    st.one_of(
        st.text(st.sampled_from(MARKS), max_size=6),
        st.text(st.sampled_from(MARKS + SPELLING), max_size=4),
        st.text(st.sampled_from("abcdefghijklmnopqS1"), max_size=40),
        st.sampled_from(BREAKING + PUNCTUATION),
        st.sampled_from(
            [*WORDPIECE_SPECIAL, "[unk]", "[[MASK]]", "[MASK", "##s", " the ", "unable", "a" * 99, "é" * 50]
        ),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=14,
).map("".join)
_PAIRS: dict[bool, Pair] = {}


def hostile_pair(cased: bool) -> Pair:
    if cased not in _PAIRS:
        forms = {part for character in POOL for part in unicodedata.normalize("NFD", character + character.lower())}
        characters = sorted({*POOL, *forms, *(part.lower() for part in forms if len(part.lower()) == 1)})
        _PAIRS[cased] = Pair(pieces_of(characters), cased=cased)
    return _PAIRS[cased]


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(HOSTILE, max_size=6), cased=st.booleans())
def test_hostile_text(texts: list[str], cased: bool):
    hostile_pair(cased).assert_equal(texts)


@pytest.mark.soak
@settings(max_examples=1_000, deadline=None)
@given(texts=st.lists(HOSTILE, min_size=5, max_size=5), cased=st.booleans())
def test_hostile_text_at_length(texts: list[str], cased: bool):
    """Each of five texts, and each followed by each: 30,000 texts."""
    hostile_pair(cased).assert_equal([*texts, *(first + second for first in texts for second in texts)])


def test_marks_that_change_places():
    """Every order of every three marks, within a word, after an accent, before a barrier, beside a special token."""
    texts = [f"a{x}{y}{z}b x{x}\u0301{y}\u0941{z} {x}[MASK]{y}{z}" for x in MARKS for y in MARKS for z in MARKS]
    hostile_pair(False).assert_equal(texts)


@pytest.mark.parametrize("letter", ["a", "é", "е", "ガ", "𐐷", "q"])
def test_length_of_words(letter: str):
    """Around 16 and 32 bytes, where the way of looking up changes, and 100 characters, the limit."""
    pair = hostile_pair(False)
    words = [letter * size for size in [*range(1, 40), *range(95, 106), 1000]]
    pair.assert_equal([*words, " ".join(words), "".join(f"{word}." for word in words), "\u0301".join(words)])


# -- all code points ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("cased", [False, True])
def test_every_code_point_in_a_word(cased: bool):
    characters = [chr(code) for code in CODE_POINTS if is_busy(code)]
    Pair(pieces_of(characters), cased=cased).assert_equal([f"a{character}a" for character in characters])


@pytest.mark.slow
def test_tables_are_those_of_the_installed_library():
    """All 1,112,064 code points; fails where another version of `tokenizers` follows another Unicode."""
    command = [sys.executable, str(ROOT / "csrc" / "text" / "generate_unicode_tables.py"), "--check"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# -- corpora -----------------------------------------------------------------------------------------------------------


def test_sample_corpus():
    texts = list(read_corpus(SAMPLE))[::4]
    common = sorted({character for text in texts for character in text})
    for cased in (False, True):
        Pair(pieces_of(common), cased=cased).assert_equal(texts)


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where vocabularies are learned that stand in for published ones."""
    return tmp_path_factory.mktemp("learned")


@pytest.mark.slow
@pytest.mark.parametrize("cased", [False, True])
@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize("name", ["bert-base-uncased", "bert-base-chinese"])
def test_corpora_in_full(name: str, corpus: str, cased: bool, learned: Path):
    pair_of(vocabulary(name, learned), cased=cased).assert_equal(texts_of(corpus))


# Every eighth document of a large corpus; all of them, minutes of the libraries we compare with, in the soak.
EVERY = pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.soak)])


@needs_shared
@pytest.mark.slow
@EVERY
def test_a_large_corpus(every: int):
    pair = pair_of(SHARED / "vocab" / "bert-base-uncased" / "vocab.txt")
    documents = read_corpus(SHARED / "corpus" / "mix_en.train.jsonl.zst")
    for texts in batched(itertools.islice(documents, 0, None, every), 2000):
        pair.assert_equal(texts)


@pytest.mark.slow
@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize("name", SENTENCEPIECE_MODELS)
def test_sentencepiece_on_corpora(name: str, corpus: str, learned: Path):
    assert_sentencepiece_equal(sentencepiece_model(name, learned), texts_of(corpus))


@needs_shared
@pytest.mark.slow
@EVERY
def test_sentencepiece_on_a_large_corpus(every: int):
    path = next((SHARED / "vocab").glob("*/30k-clean.model"))
    documents = read_corpus(SHARED / "corpus" / "mix_en.train.jsonl.zst")
    assert_sentencepiece_equal(path, itertools.islice(documents, 0, None, every))


def assert_sentencepiece_equal(path: Path, texts: Iterable[str]) -> None:
    from sentencepiece import SentencePieceProcessor

    library, tokenizer = SentencePieceProcessor(model_file=str(path)), load_tokenizer(path)
    for some in batched(texts, 2000):
        ids, lengths = tokenizer.encode(some)
        expected = library.encode(some)
        assert lengths.tolist() == [*map(len, expected)]
        assert np.array_equal(ids, np.concatenate(expected))


def batched(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """Lists of `size` texts: the ids of a large corpus, as lists of Python, would not fit into memory."""
    iterator = iter(texts)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


@pytest.mark.slow
@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize("kind", ["bert", "bpe"])
def test_tokenizer_json_on_corpora(tmp_path: Path, kind: str, corpus: str, learned: Path):
    from tokenizers import Tokenizer as Pipeline

    texts = texts_of(corpus)
    path = tmp_path / "tokenizer.json"
    if kind == "bert":
        load_tokenizer(vocabulary("bert-base-chinese", learned)).save_pretrained(tmp_path)
    else:
        path.write_bytes(learn_byte_bpe(texts[::4], 4000, cased=False))
    ids, lengths = load_tokenizer(path).encode(texts)
    expected = [item.ids for item in Pipeline.from_file(str(path)).encode_batch(texts, add_special_tokens=False)]
    assert lengths.tolist() == [*map(len, expected)]
    assert np.array_equal(ids, np.concatenate(expected))


# -- the encoder -------------------------------------------------------------------------------------------------------


def test_ids_beyond_16_bits():
    pieces = [*pieces_of(["x"]), *(f"word{number}" for number in range(70_000)), "y"]
    pair = Pair(pieces, cased=False)
    pair.assert_equal(["word69999 y x", "y" * 50, "x word12345, y"])
    assert pair.ours.encode(["y"])[0].tolist() == [len(pieces) - 1]


def test_threads_share_one_encoder():
    pair = hostile_pair(False)
    texts = [
        [f"the cat{number} sat é{number * 7919} unable 中 {number}" for number in range(i, i + 2000)] for i in range(8)
    ]
    expected = [pair.ours.encode(batch)[0].tolist() for batch in texts]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda batch: pair.ours.encode(batch)[0].tolist(), texts * 4))
    assert found == expected * 4


def test_a_word_that_takes_the_place_of_another_in_the_cache():
    """More different words than the cache holds, each several times."""
    pair = hostile_pair(False)
    words = [f"{letter}{number}" for number in range(9_000) for letter in ("x", "abcdefghijklmnopqrs", "é")]
    pair.assert_equal([" ".join(words), " ".join(reversed(words)), ",".join(words)])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pieces": ["[UNK]", "a", "a"]}, "piece 2 is the same as piece 1"),
        ({"unknown_id": -1}, "id -1 does not fit"),
        ({"unknown_id": 1 << 16}, "id 65536 does not fit"),
        ({"special": [("[A]", 70_000)]}, "id 70000 does not fit"),
        ({"special": [("<mask>", 1)]}, "<mask> is not written as"),
        ({"special": [("[a[b]", 1)]}, "is not written as"),
        ({"max_word_characters": 15}, "must be 16 to 1000, found 15"),
        ({"max_word_characters": 1001}, "must be 16 to 1000, found 1001"),
        ({"pieces": ["p"] + [""] * 65_536}, "id 65536 does not fit"),
    ],
)
def test_bad_vocabularies_are_refused(change: dict[str, Any], words: str):
    good = {"pieces": ["[UNK]", "a"], "special": [], "unknown_id": 0, "is_cased": False, "max_word_characters": 100}
    assert native().WordPiece16(**good).encode(["a b"])[0].tolist() == [1, 0]
    with pytest.raises(ValueError, match=words):
        native().WordPiece16(**good | change)


# -- tokenizer.json ----------------------------------------------------------------------------------------------------


def saved_json(folder: Path) -> dict[str, Any]:
    (folder / "vocab.txt").write_text("\n".join(pieces_of(list("abcdefgxyzé中,."))) + "\n", encoding="utf-8")
    load_tokenizer(folder / "vocab.txt").save_pretrained(folder / "saved")
    return json.loads((folder / "saved" / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("path", "value", "is_ours"),
    [
        ((), None, True),
        (("normalizer", "strip_accents"), True, True),
        (("normalizer", "strip_accents"), False, False),
        (("normalizer", "clean_text"), False, False),
        (("normalizer", "handle_chinese_chars"), False, False),
        (("normalizer", "lowercase"), False, True),
        (("normalizer",), None, False),
        (("normalizer",), {"type": "Lowercase"}, False),
        (("pre_tokenizer",), {"type": "Whitespace"}, False),
        (("model", "continuing_subword_prefix"), "@@", False),
        (("model", "max_input_chars_per_word"), 3, False),
        (("model", "max_input_chars_per_word"), 16, True),
        (("model", "unk_token"), "[PAD]", True),
        (("added_tokens", 4, "lstrip"), True, False),
        (("added_tokens", 4, "normalized"), True, False),
        (("added_tokens", 4, "single_word"), True, False),
        (("added_tokens", 4, "special"), False, True),
    ],
)
def test_json_of_bert_is_encoded_by_us_and_any_other_by_the_library(
    tmp_path: Path, path: tuple, value: Any, is_ours: bool
):
    fields = saved_json(tmp_path)
    place: Any = {"root": fields}
    for key in ("root", *path)[:-1]:
        place = place[key]
    if path:
        place[path[-1]] = value
    (tmp_path / "other.json").write_text(json.dumps(fields), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path / "other.json")
    texts = ["The abc  [MASK], [mask] xé", "中abcd É\u0301 a@@b ##s", "", "xabc [MASK] [CLS]a[SEP]", "a" * 16, "a" * 17]
    ids, lengths = tokenizer.encode(texts)
    expected = tokenizer.encode_batch(texts)
    assert ids.tolist() == sum(expected, [])
    assert lengths.tolist() == [*map(len, expected)]
    assert (tokenizer._encoder is not None) == is_ours  # type: ignore[attr-defined]


# -- start, memory, the library's own tests ----------------------------------------------------------------------------


def test_neither_torch_nor_the_libraries_are_imported(tmp_path: Path):
    (tmp_path / "vocab.txt").write_text("\n".join(pieces_of(["a"])) + "\n")
    code = (
        "import sys; from pretrain.data.tokenizer.load import load_tokenizer; "
        f"print(load_tokenizer({str(tmp_path / 'vocab.txt')!r}).encode(['a [MASK]'])[0].tolist()); "
        "print([name for name in ('torch', 'tokenizers', 'transformers', 'sentencepiece') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.split("\n") == ["[13, 4]", "[]", ""]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("text", ["'a' * 10**8", "'the cat ' * (10**8 // 8)", "'中' * (10**8 // 3)"])
def test_memory_of_a_huge_text_is_bounded(tmp_path: Path, text: str):
    """At most six times the text: itself, its UTF-8 and two bytes per token while they grow."""
    (tmp_path / "vocab.txt").write_text("\n".join(pieces_of(["a", "中"])) + "\n", encoding="utf-8")
    code = (
        "import re; from pathlib import Path; from pretrain.data.tokenizer.load import load_tokenizer; "
        # Not getrusage: its maximum goes on from the parent's.
        "peak = lambda: 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]); "
        f"tokenizer = load_tokenizer({str(tmp_path / 'vocab.txt')!r}); tokenizer.encode(['a']); "
        f"before = peak(); tokenizer.encode([{text}]); print(peak() - before)"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert 10**8 // 2 < int(result.stdout) < 6 * 10**8
