"""Splits texts into sentences before tokenisation, for rows of whole sentences like BERT's segments.

The rules are in csrc/include/taco/sentences.hpp; they need no model, no download and no language name.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pretrain.data.native import native


def split_sentences(texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The sentences of all texts in order, and how many each text has (int64 [num_texts]).

    Only whitespace before, between and after sentences is left out. A text of whitespace only has no sentence, every
    other text at least one. The sentences' WordPiece ids, concatenated, are those of the text.

    Raises:
        TypeError: an element is not a str.
        UnicodeEncodeError: a text holds a lone surrogate.
    """
    return native().split_sentences(texts)
