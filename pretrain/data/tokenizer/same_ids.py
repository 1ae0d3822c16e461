"""Whether two tokenizers give the same ids, whatever files they are from: a vocab.txt and its tokenizer.json do."""

from __future__ import annotations

import random
from collections.abc import Sequence

from pretrain.data.tokenizer.base import Tokenizer

_MOST_PIECES = 20_000
_WORD_MARKS = "##", "\u2581", "\u0120"
# What tokenizers treat differently: case, accents, full-width forms, ideographs, punctuation, spaces, numbers.
_SAMPLES = (
    "The Quick brown FOX, jumped over 13 lazy dogs; it's 3.14 o'clock (or so) -- isn't it?",
    "Ålesund naïve CAFÉ cafe\u0301 Straße İstanbul ﬁne Ⅷ ｆｕｌｌ",
    "中文字符 和 English 混合 日本語テスト 한국어 русский ελληνικά العربية हिन्दी",
    "two  spaces\tand\na line\u00a0no-break\u200bzero\ufeffwidth \x00control\x7f \ufffd",
    "e-mail@example.org/path?x=1&y=2 #tag $5 €10 50% a_b C++ 😀",
    "a" * 99 + " " + "a" * 101,
)


def find_difference(left: Tokenizer, right: Tokenizer) -> str | None:
    """Where two tokenizers differ, in words that say "one" and "the other" for `left` and `right`; None: same ids.

    All pieces, the special ids, and the ids of sample texts and of pieces in several spellings are compared.
    """
    if left.info.sha256 == right.info.sha256:
        return None
    if left.vocab_size != right.vocab_size:
        return f"one has {left.vocab_size:,} pieces, the other {right.vocab_size:,}"
    for index in range(left.vocab_size):
        if left.piece(index) != right.piece(index):
            return f"id {index} is {left.piece(index)!r} in one and {right.piece(index)!r} in the other"
    if left.special != right.special:
        return f"special ids are {left.special} in one and {right.special} in the other"
    texts = [*_SAMPLES, *_spellings(left)]
    for text, ours, theirs in zip(texts, left.encode_batch(texts), right.encode_batch(texts), strict=True):
        if ours != theirs:
            shown = text if len(text) <= 40 else f"{text[:40]}..."
            return f"{shown!r} is {_name(left, ours)} in one and {_name(right, theirs)} in the other"
    return None


def _spellings(tokenizer: Tokenizer) -> list[str]:
    """Pieces as words: as they are, in capitals, and several joined, which shows in which order a pipeline merges."""
    special = set(tokenizer.special_ids())
    step = max(1, tokenizer.vocab_size // _MOST_PIECES)
    words = [_bare(tokenizer.piece(index)) for index in range(0, tokenizer.vocab_size, step) if index not in special]
    shuffled = random.Random(0)  # always the same texts
    joined = ["".join(shuffled.choices(words, k=4)) for _ in range(len(words) + 100)] if words else []
    return [*words, *(word.upper() for word in words), *joined]


def _bare(piece: str) -> str:
    for mark in _WORD_MARKS:
        piece = piece.removeprefix(mark) or piece
    return piece


def _name(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The first pieces of a text."""
    names = [tokenizer.piece(index) for index in ids[:4]]
    return " ".join(names) + (" ..." if len(ids) > 4 else "")
