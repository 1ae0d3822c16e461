"""Whether a WordPiece vocabulary fits the casing that it is read with: pieces that no text can give are counted."""

from __future__ import annotations

import unicodedata

from pretrain.data.tokenizer.base import Tokenizer

# Uncased vocabularies of others hold a few pieces such as <S>; a cased one holds thousands.
_MOST_UNREACHABLE = 0.001


def casing_mismatch(tokenizer: Tokenizer) -> str | None:
    """What a WordPiece vocabulary loses by being read as it is, in words with the remedy; None if it seems right."""
    if tokenizer.info.kind != "wordpiece":
        return None
    special = set(tokenizer.special_ids())
    pieces = [
        piece
        for index, piece in enumerate(map(tokenizer.piece, range(tokenizer.vocab_size)))
        if index not in special and not (piece.startswith("[") and piece.endswith("]"))
    ]
    if tokenizer.info.cased:
        known = set(pieces)
        capitals = [piece.upper() for piece in pieces if len(piece) == 1 and len(piece.upper()) == 1]
        capitals = [capital for capital in capitals if capital.lower() != capital]
        missing = [capital for capital in capitals if capital not in known]
        if 2 * len(missing) <= len(capitals):
            return None
        return (
            f"looks uncased: of its {len(capitals):,} letters {len(missing):,} have no capital ({_some(missing)}), and "
            "a word with such a capital becomes [UNK]; leave out --cased, or take a cased vocabulary"
        )
    unreachable = [piece for piece in pieces if _fold(piece) != piece]
    if len(unreachable) <= _MOST_UNREACHABLE * len(pieces):
        return None
    return (
        f"looks cased: {len(unreachable):,} of its {tokenizer.vocab_size:,} pieces "
        f"({100 * len(unreachable) / tokenizer.vocab_size:.1f} %) have capitals or accents ({_some(unreachable)}), and "
        "no text gives them, since it is lower-cased; add --cased, or take an uncased vocabulary"
    )


def _fold(text: str) -> str:
    """As BERT's normaliser: without accents, lower case."""
    plain = "".join(char for char in unicodedata.normalize("NFD", text) if unicodedata.category(char) != "Mn")
    return plain.lower()


def _some(pieces: list[str]) -> str:
    return ", ".join(pieces[:3]) + (", ..." if len(pieces) > 3 else "")
