"""Encodes long texts in parts, with libraries that need a hundred times a text's memory.

A text is cut where a new word begins, and only if the cut changes nothing: the ids of the characters around it must be
the same in one piece and in two. Pieces that no cut fits, such as those of models that join words, keep the text whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

# Parts are about this long; with 130 bytes per character, a library then needs some 35 MB.
PART_CHARACTERS = 1 << 18
# A cut is tried on so many characters on each side: no word, special token or choice between pieces reaches so far.
_TRIED_CHARACTERS = 2000
_MOST_TRIES = 32
# Before a space or a line end between two letters; else after the end of a sentence in scripts without spaces.
_CUT = re.compile(r"(?<=[^\W\d_])[ \n](?=[^\W\d_])|(?<=[\u3002\uff01\uff1f])(?=[^\W\d_])")

# Texts to their ids, concatenated, and the number of ids of each text (int64).
Encode = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]


def encode_in_parts(texts: Sequence[str], encode: Encode) -> tuple[np.ndarray, np.ndarray]:
    """`encode(texts)`, without ever passing it a long text that can be cut."""
    if all(len(text) <= PART_CHARACTERS for text in texts):
        return encode(texts)
    ids, lengths = [], np.zeros(len(texts), np.int64)
    for number, text in enumerate(texts):
        for part in cut_long(text, encode):
            ids.append(encode([part])[0])
            lengths[number] += ids[-1].size
    return np.concatenate(ids), lengths


def cut_long(text: str, encode: Encode) -> Iterator[str]:
    """Parts of `text` of about `PART_CHARACTERS`, whose ids in a row are those of `text`."""
    start = 0
    while len(text) - start > PART_CHARACTERS:
        cut = _find_cut(text, start + PART_CHARACTERS, encode)
        if cut is None:
            break
        yield text[start:cut]
        start = cut
    yield text[start:]


def _find_cut(text: str, first: int, encode: Encode) -> int | None:
    """The first place from `first` on at which cutting changes no id; None if no place near there does."""
    for number, match in enumerate(_CUT.finditer(text, first)):
        if number == _MOST_TRIES:
            break
        cut = match.start()
        before, after = text[cut - _TRIED_CHARACTERS : cut], text[cut : cut + _TRIED_CHARACTERS]
        (both, _), (apart, _) = encode([before + after]), encode([before, after])
        if np.array_equal(both, apart):
            return cut
    return None
