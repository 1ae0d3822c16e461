"""Sentences end where people end them, in many scripts; nothing but whitespace is lost, whatever the text holds."""

from __future__ import annotations

import io
import json
import string
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from project import SAMPLE, SHARED

from pretrain.data.sentences import split_sentences
from pretrain.data.tokenizer.load import load_tokenizer

# White_Space of Unicode; Python's str.isspace also takes U+001C to U+001F.
WHITE_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))

# Sentences are divided by " | ", which stands for one blank.
SPACED = [
    "He came. | She went.",
    "Is it? | Yes! | Good.",
    "Mr. Smith met Mrs. Jones and Dr. Who. | They spoke.",
    "MR. DARCY bowed. | MRS. BENNET did not.",
    "J. R. R. Tolkien wrote it. | C. S. Lewis read it.",
    "J.-P. Sartre, i.e. the philosopher, e.g. in Paris, said so.",
    "He lives in the U.S. with a cat. | She does not.",
    "He lives in the U.S. | The others do not.",
    "The U.S. Senate met at 5 p.m. | It was late.",
    "At 3 p.m. Eastern time it began.",
    "Pi is 3.14159. | It never ends.",
    "See No. 5 and vol. II, pp. 3-4, Fig. 2. | No. | He said no. | I said yes.",
    "He said no. | I am sure of it.",
    "Founded in 1999. | Closed in 2001.",
    "1. Wash the rice. | 2. Boil it.",
    "2.1. Scope of the work. | It is wide.",
    "IV. The fourth part. | It is long.",
    "A. The first answer. | B. The second answer.",
    "Well... | Perhaps, but not now... and not then.",
    "Well… | Perhaps so… or not.",
    "And so on. . . . | Then nothing.",
    '"Why?" she asked. | "Because!" he cried.',
    '"Why?" | "Because."',
    "“I know,” he said. | “Do you?” | He left.",
    "‘Where?’ said he. | ‘Here.’",
    "(He left.) | She stayed. | (Did he?) | Nobody knows.",
    "He asked (really?) John about it [sic!] and left.",
    "She likes tea (green, black, etc.) and coffee. | He does not.",
    "They sell pens, ink, etc. | Paper is extra.",
    "Smith et al. Found nothing, said A. Jones et al. | The others did.",
    "Apple Inc. Chief Tim Cook spoke. | He sold it to Foo Inc. | They paid.",
    "John Smith Jr. Jumped. | Gen. Lee and Lt.-Col. Moran came with Capt. Cook.",
    "He was co-ed. | Freshmen were not.",
    "It was I. | My brother stayed.",
    "Was it I? | It was.",
    "_Never._ | He went.",
    "**Bold.** | Next.",
    "It was cold.[12] | They left.[3][4] | Nobody saw it.",
    "Go to www.example.com today. | Or to example.org. | Nobody minds.",
    "The iPhone is sold. | 2019 was good. | $5 is cheap. | 100% sure.",
    "He won! | 5 people cheered.",
    "All lower case. it goes on. and on",
    "Wait!! | What?! | No...",
    "Yahoo! is a company.",
    "No. 7 is here. | Nos. 3 and 4 are not.",
    "Born on Jan. 5 in Wash. State. | He died in Dec. | His son lived.",
    "Prof. Dr. Müller kommt am 3. Oktober. | Er bleibt bis zum 20. Jahrhundert.",
    "Das gilt z. B. für Häuser, d. h. für alle. | Das war z.B. Holz.",
    "Er sagte: „Komm!“ | Dann ging er. | „Warum?“ | Niemand weiß es.",
    "»Komm!« | Er kam. | Öl ist teuer. | Ärzte auch.",
    "M. Dupont et Mme. Durand sont là. | Ils partent. | Étienne reste.",
    "« Pourquoi ? » | Il ne sait pas. | À demain !",
    "¿Cómo estás? | ¡Muy bien! | El Sr. García y la Sra. López vienen. | Ella no.",
    "Il dott. Rossi, il sig. Bianchi e l'avv. Verdi. | È tardi.",
    "Dhr. De Vries komt, o.a. op 5 mei. | Het is laat.",
    "— Пойдём! — сказал он. | — Да. | А. С. Пушкин жил в Москве. | Он умер.",
    "Это было в 1812 г. и в 1813 г. | Потом кончилось, т. е. прошло.",
    "Το είδα. | Πού; | Ναι! | Έφυγε.",
    "Prezydent m.in. Polski i np. Francji. | Świat czeka.",
    "Sayın Doç. Dr. Yılmaz geldi. | İyi.",
    "هل أنت بخير؟ | نعم. | شكرا!",
    "یہ اچھا ہے۔ | وہ نہیں ہے۔",
    "यह घर है। | वह नहीं है? | ठीक है॥",
    "डॉ. शर्मा आए। | वे गए।",
    "그는 갔다. | 네. | 알겠습니다.",
    "Բարեւ։ | Ինչպես ես։",
    "კარგი. | მადლობა.",
    "ይህ ቤት ነው። | ያ አይደለም።",
    "ฉันไป. | เขามา",
]
# The same for scripts that put no blank between sentences; "|" alone divides.
DENSE = [
    "今天很好。|明天呢？|也好！",
    "他说：“我来。”|然后走了。",
    "他說「我來。」，然後走了。|她沒有。",
    "真的吗?|是的!|好。",
    "我……我不知道。|算了……",
    "「行く。」と彼は言った。|彼は去った！|本当？|ええ。",
    "『え？』って何。|（終わり。）|次。",
    "Yahoo!ニュースを見た。|3.14は円周率。",
    "価格は３．１４です．|次です．",
    "这是第1条。|2019年开始。",
    "है।|तो",
]


@pytest.mark.parametrize("case", SPACED, ids=range(len(SPACED)))
def test_sentences_divided_by_blanks(case: str):
    text = case.replace(" | ", " ")
    assert " | ".join(split_sentences([text])[0]) == case
    wrapped = text.replace(" ", "\n")
    assert "|".join(split_sentences([wrapped])[0]) == case.replace(" | ", "|").replace(" ", "\n")


@pytest.mark.parametrize("case", DENSE, ids=range(len(DENSE)))
def test_sentences_of_scripts_without_blanks(case: str):
    assert "|".join(split_sentences([case.replace("|", "")])[0]) == case


@pytest.mark.parametrize("gap", ["\n\n", "\n \t\n", "\r\n\r\n", "\n\u3000\n", " \n\n\n ", "\u2029", "\r\r"])
def test_paragraphs_always_end_a_sentence(gap: str):
    assert split_sentences([f"CHAPTER I{gap}the storm"])[0] == ["CHAPTER I", "the storm"]
    assert split_sentences([f"Mr.{gap}Smith"])[0] == ["Mr.", "Smith"]


@pytest.mark.parametrize("gap", ["\n", "\r\n", "\r", " \n ", "\u2028", "\x0b", "\x0c"])
def test_one_end_of_line_is_only_whitespace(gap: str):
    assert split_sentences([f"of the{gap}Storm. It{gap}came"])[0] == [f"of the{gap}Storm.", f"It{gap}came"]


def test_counts_say_which_text_a_sentence_is_of():
    sentences, counts = split_sentences(["A cat. A dog.", "", " \n\t", "one", "\u3000Yes. \n"])
    assert sentences == ["A cat.", "A dog.", "one", "Yes."]
    assert counts.dtype == np.int64
    assert counts.tolist() == [2, 0, 0, 1, 1]
    assert split_sentences([])[0] == []
    assert split_sentences(())[1].shape == (0,)


def test_only_text_is_taken():
    with pytest.raises(TypeError, match="text 1: expected str, found bytes"):
        split_sentences(["a", b"b"])  # type: ignore[list-item]
    with pytest.raises(UnicodeEncodeError):
        split_sentences(["\ud800"])
    with pytest.raises(TypeError):
        split_sentences(None)  # type: ignore[arg-type]


def test_a_sentence_begins_with_any_character_but_lower_case():
    """All of Unicode 14, that of Python 3.11: what the tables say is what Python's database says."""
    without_capitals = "GEORGIAN", "CHEROKEE", "MATHEMATICAL"
    later = range(0x1DF25, 0x1DF2B)  # letters that came with Unicode 15, which Python 3.12 follows
    wrong = []
    for code in sorted({*range(0x21, sys.maxunicode + 1)} - {*later}):
        character = chr(code)
        category = unicodedata.category(character)
        if (
            category in ("Cn", "Cs")
            or category[0] in "ZP"
            or unicodedata.name(character, "").startswith(without_capitals)
        ):
            continue
        if (len(split_sentences([f"It is. {character}X"])[0]) == 1) != (category == "Ll"):
            wrong.append((hex(code), category))
    assert wrong == []


ALPHABET = st.one_of(
    st.sampled_from(list(".!?…。！？।؟'\"”“’»«)]([—-_*,;:") + [" ", "\n", "\r", "\u3000", "\u2029", "\x85", "\x0c"]),
    st.sampled_from(["Mr", "The", "I", "A", "a", "No", "5", "U.S", "と", "中", "é", "É", "etc", "[1]"]),
    st.characters(exclude_categories=["Cs"]),
)
TEXTS = st.lists(ALPHABET, max_size=40).map("".join)


def strip_spaces(text: str) -> str:
    return text.translate({ord(character): None for character in WHITE_SPACE})


@given(TEXTS)
@settings(max_examples=500, deadline=None)
def test_only_whitespace_between_sentences_is_lost(text: str):
    sentences, counts = split_sentences([text])
    assert counts.tolist() == [len(sentences)]
    assert (len(sentences) > 0) == bool(text.strip(WHITE_SPACE))
    at = 0
    for sentence in sentences:
        begin = text.index(sentence, at)
        assert not text[at:begin].strip(WHITE_SPACE)
        assert sentence == sentence.strip(WHITE_SPACE) != ""
        at = begin + len(sentence)
    assert not text[at:].strip(WHITE_SPACE)


@given(TEXTS, TEXTS)
@settings(max_examples=500, deadline=None)
def test_a_sentence_is_one_sentence_by_itself(text: str, other: str):
    sentences = split_sentences([text])[0]
    alone, counts = split_sentences(sentences)
    assert alone == sentences
    assert counts.tolist() == [1] * len(sentences)
    assert split_sentences([text, other, text])[0] == [*sentences, *split_sentences([other])[0], *sentences]
    assert split_sentences(["\n\n".join(sentences)])[0] == sentences


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Letters alone and inside words: words that grow together or fall apart give other ids."""
    letters = string.ascii_lowercase + string.ascii_uppercase + "ÉéÎîöüßäабв"
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *letters,
        *(f"##{x}" for x in letters),
        "中",
        "文",
        ".",
        "。",
    ]
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("cased", [False, True])
@given(text=TEXTS)
@settings(max_examples=500, deadline=None)
def test_wordpiece_ids_of_the_sentences_are_those_of_the_text(vocab: Path, cased: bool, text: str):
    tokenizer = load_tokenizer(vocab, cased=cased)
    whole = tokenizer.encode_batch([text])[0]
    assert sum(tokenizer.encode_batch(split_sentences([text])[0]), []) == whole


def read_texts(path: Path) -> list[str]:
    with path.open("rb") as file:
        lines = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="utf-8", newline="\n")
        return [json.loads(line)["text"] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("path", [SAMPLE, SHARED / "corpus/zh_wiki.jsonl.zst", SHARED / "corpus/ja_aozora.jsonl.zst"])
def test_wordpiece_ids_of_whole_corpora(vocab: Path, path: Path):
    if not path.exists():
        pytest.skip("no shared corpora; set TACO_SHARED_DATA")
    texts = read_texts(path)
    tokenizer = load_tokenizer(vocab, cased=True)
    sentences, counts = split_sentences(texts)
    assert 20_000 < len(sentences) == counts.sum()
    whole = [index for ids in tokenizer.encode_batch(texts) for index in ids]
    assert [index for ids in tokenizer.encode_batch(sentences) for index in ids] == whole


def test_endings_that_another_splitter_finds_too():
    """sentencex, where it is installed, ends fewer sentences (none inside a quotation), nearly all of them ours."""
    sentencex = pytest.importorskip("sentencex", reason="sentencex is not installed")
    ours, theirs = 0, 0
    for text in read_texts(SAMPLE)[:40]:
        found = _endings(split_sentences([text])[0])
        other = _endings(sentencex.segment("en", text))
        ours += len(found & other)
        theirs += len(other)
    assert theirs > 1000
    assert ours > 0.9 * theirs


def _endings(sentences: list[str]) -> set[int]:
    """How many letters stand before the end of each sentence."""
    lengths = [len(strip_spaces(sentence)) for sentence in sentences]
    return set(np.cumsum([length for length in lengths if length]).tolist())


@pytest.mark.parametrize(
    "unit",
    [
        ".",
        ". ",
        "! ",
        ".) ",
        '."',
        "([",
        ". — ",
        "\n",
        " ",
        "a.",
        "A. ",
        "[1].",
        "。",
        "。”",
        "1. ",
        "…",
        "''",
        "\u3000",
        ".\n\n",
    ],
)
def test_time_is_linear_in_hostile_text(unit: str):
    """A tenth of this text takes a tenth of the time; quadratic work would run into the test's time limit."""
    text = "x" + unit * (1_000_000 // len(unit))
    sentences = split_sentences([text])[0]
    assert sum(len(strip_spaces(sentence)) for sentence in sentences) == len(strip_spaces(text))


@pytest.mark.parametrize("end", ["", ".", "\u3002", "\n"])
def test_texts_of_one_character(end: str):
    for text in ("", "a", ".", "\u3002", "\u00a0", "\n", "\U00020000", "\x00"):
        expected = (text + end).strip(WHITE_SPACE)
        assert split_sentences([text + end])[0] == ([expected] if expected else [])
