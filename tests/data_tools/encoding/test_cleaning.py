"""Cleaning does what was asked for and nothing else, and every dropped text has its reason."""

from __future__ import annotations

import pickle
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.encoding.cleaning import CleaningOptions, clean, count_dropped, drop_by_tokens
from pretrain.data.dataset.manifest import Dropped
from pretrain.errors import ConfigError

TEXTS = st.lists(
    st.one_of(
        st.sampled_from(
            ["a", " ", "\n", "\r\n", "\t", "\x00", "\x0c", "\x85", "\u2029", "\u00a0", "e\u0301", "ﬁ", "Ａ"]
        ),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=20,
).map("".join)


def cleaned(text: str, **options: object) -> str:
    """The one text that is kept."""
    kept, reasons = clean([text], CleaningOptions(**options))  # type: ignore[arg-type]
    assert reasons == [None]
    return kept[0]


@given(st.lists(TEXTS, max_size=5))
def test_nothing_is_done_unless_asked_for(texts: list[str]):
    kept, reasons = clean(texts, CleaningOptions())
    assert kept == [text for text in texts if text.strip()]
    assert reasons == [None if text.strip() else "empty" for text in texts]


def test_normalisation():
    assert cleaned("cafe\u0301 ﬁ Ａ", normalize="nfc") == "café ﬁ Ａ"
    assert cleaned("cafe\u0301 ﬁ Ａ", normalize="nfkc") == "café fi A"
    assert cleaned("cafe\u0301") == "cafe\u0301"


def test_control_characters():
    text = "page\x0cnext\x00 a\x85b\tc\r\nd\x9f"
    assert cleaned(text, control_characters="space") == "page next  a b\tc\r\nd "
    assert cleaned(text) == text
    assert clean(["a\x0cb", "a\x00b", "a\x7f"], CleaningOptions(control_characters="drop")) == (
        ["a\x0cb"],
        [None, "control_characters", "control_characters"],
    )
    assert clean(["\x00\x01", "\x00a"], CleaningOptions(control_characters="space")) == ([" a"], ["empty", None])


def test_whitespace_is_folded_and_paragraphs_stay():
    text = "  a\tb\nc \n \n d\u00a0\u3000e\r\n\r\n\r\nf\u2029g\n\n"
    assert cleaned(text, fold_whitespace=True) == "a b c\n\nd e\n\nf\n\ng"
    assert cleaned(text) == text


def test_limits_of_length():
    options = CleaningOptions(min_chars=2, max_chars=3, fold_whitespace=True)
    assert clean(["a", " a ", "ab", "中文字", "a  b", "abcd", ""], options) == (
        ["ab", "中文字", "a b"],
        ["too_short", "too_short", None, None, None, "too_long", "empty"],
    )


def test_limits_of_tokens():
    lengths = np.array([0, 1, 2, 5, 6])
    assert drop_by_tokens(lengths[1:], CleaningOptions()) == {}
    found = drop_by_tokens(lengths, CleaningOptions(min_tokens=2, max_tokens=5))
    assert {reason: mask.tolist() for reason, mask in found.items()} == {
        "no_tokens": [True, False, False, False, False],
        "too_few_tokens": [False, True, False, False, False],
        "too_many_tokens": [False, False, False, False, True],
    }
    assert list(drop_by_tokens(lengths, CleaningOptions())) == ["no_tokens"]


def test_what_is_dropped_is_counted():
    texts = ["", "中文", " ", "kept", "é"]
    assert count_dropped(texts, ["empty", "too_short", "empty", None, "too_short"]) == {
        "empty": Dropped(documents=2, bytes=1),
        "too_short": Dropped(documents=2, bytes=8),
    }
    assert count_dropped([], []) == {}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"normalize": "NFD"}, "--normalize NFD: expected one of none, nfc, nfkc"),
        ({"control_characters": "no"}, "--control-characters no: expected one of keep, space, drop"),
        ({"min_chars": -1}, "--min-chars -1: expected 0 or more"),
        ({"min_chars": 5, "max_chars": 4}, r"--max-chars 4: expected at least --min-chars \(5\)"),
        ({"max_tokens": 0}, "--max-tokens 0: expected at least"),
    ],
)
def test_options_that_cannot_work(options: dict[str, object], words: str):
    with pytest.raises(ConfigError, match=words):
        CleaningOptions(**options)  # type: ignore[arg-type]


def test_options_travel_to_other_processes():
    options = CleaningOptions(normalize="nfkc", max_chars=9, split_sentences=True)
    assert pickle.loads(pickle.dumps(options)) == options  # noqa: S301 - our own bytes


OPTIONS = st.builds(
    CleaningOptions,
    normalize=st.sampled_from(["none", "nfc", "nfkc"]),
    control_characters=st.sampled_from(["keep", "space", "drop"]),
    fold_whitespace=st.booleans(),
    min_chars=st.integers(0, 3),
    max_chars=st.one_of(st.none(), st.integers(3, 12)),
)


@pytest.mark.slow
@given(st.lists(TEXTS, max_size=6), OPTIONS)
@settings(max_examples=500, deadline=None)
def test_cleaning_against_the_plain_rules(texts: list[str], options: CleaningOptions):
    kept, reasons = clean(texts, options)
    assert len(reasons) == len(texts)
    assert len(kept) == reasons.count(None)
    assert clean(texts[:1], options)[1] == reasons[:1]
    for text in kept:
        if options.normalize == "nfc" and not options.fold_whitespace and options.control_characters != "space":
            assert text == unicodedata.normalize("NFC", text)
        if options.control_characters == "space":
            assert all(unicodedata.category(c) != "Cc" or c in "\t\n\r" for c in text)
        if options.fold_whitespace:
            assert text.split("\n\n") == [" ".join(part.split()) for part in text.split("\n\n")]
            assert clean([text], options)[0] in ([text], [])
        assert options.min_chars <= len(text) <= (options.max_chars or sys.maxsize)
    total = count_dropped(texts, reasons)
    assert sum(item.documents for item in total.values()) + len(kept) == len(texts)


def test_marks_without_end_cannot_stall_normalisation():
    """Sorting them takes quadratic time: this text would take a quarter of an hour."""
    many = "a" + "\u0301\u0316" * 500_000
    options = CleaningOptions(normalize="nfc")
    assert clean([many, "b" * 700 + many, "e" + "\u0301\u0316" * 500, "e\u0301" * 5000], options)[1] == [
        "too_many_marks",
        "too_many_marks",
        None,
        None,
    ]
    assert clean(["a" + "\uff9e\u0301" * 9999], CleaningOptions(normalize="nfkc"))[1] == ["too_many_marks"]
    assert clean([many], CleaningOptions())[1] == [None]


def test_every_character_that_normalisation_sorts_is_seen_as_a_mark():
    from data_tools.encoding.cleaning import _is_mark

    for code in range(sys.maxunicode + 1):
        character = chr(code)
        first = unicodedata.normalize("NFKD", character)[0]
        if unicodedata.combining(first):
            assert _is_mark(character), hex(code)
