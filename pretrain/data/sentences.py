"""Texts to sentences, before tokenising: for rows that hold whole sentences, as BERT's segments do.

The rules stand in csrc/include/taco/sentences.hpp; they need no model, no download and no name of a language.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pretrain.data.native import native


def split_sentences(texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The sentences of all texts in order, and how many each text has (int64 [num_texts]).

    Only whitespace before, between and after sentences is left out; a text of nothing but whitespace has none, every
    other one at least one. WordPiece ids of the sentences, one after the other, are those of the text.

    Raises:
        TypeError: an element is not a str.
        UnicodeEncodeError: a text holds a lone surrogate.
    """
    return native().split_sentences(texts)
