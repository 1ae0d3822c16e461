"""How many rows the word matrix has; imports no torch."""

from __future__ import annotations

# 128 bytes of 16-bit logits. With 30,522 words the rows of the logits break 16-byte alignment, and the three products
# of the vocabulary head take three times as long on a GPU as with 30,528.
_WORDS_MULTIPLE = 64


def padded_vocab_size(vocab_size: int, tp_size: int = 1) -> int:
    """Rows of the word matrix over all tensor-parallel ranks: the words, and unused rows that make equal, even parts.

    Unused rows are 0, stay 0, and are in no checkpoint, export, loss or norm.
    """
    multiple = _WORDS_MULTIPLE * tp_size
    return -(-vocab_size // multiple) * multiple
