"""Whether a WordPiece vocabulary fits the casing that it is read with: pieces that no text can give are counted."""

from __future__ import annotations

import unicodedata

from pretrain.data.tokenizer.base import Tokenizer
from pretrain.data.tokenizer.json_file import JsonTokenizer

# Uncased vocabularies of others hold a few pieces such as <S>; a cased one holds thousands.
_MOST_UNREACHABLE = 0.001


def casing_mismatch(tokenizer: Tokenizer) -> str | None:
    """What a WordPiece vocabulary loses by being read as it is, in words with the remedy; None if it seems right."""
    is_json = isinstance(tokenizer, JsonTokenizer)
    if tokenizer.info.kind != "wordpiece" and not (isinstance(tokenizer, JsonTokenizer) and tokenizer.is_wordpiece):
        return None
    special = set(tokenizer.special_ids())
    pieces = [
        piece
        for index, piece in enumerate(map(tokenizer.piece, range(tokenizer.vocab_size)))
        if index not in special and not (piece.startswith("[") and piece.endswith("]"))
    ]
    if tokenizer.info.cased:
        return _find_missing_capitals(pieces, is_json)
    return _find_unreachable(pieces, is_json)


def _find_missing_capitals(pieces: list[str], is_json: bool) -> str | None:
    known = set(pieces)
    capitals = [piece.upper() for piece in pieces if len(piece) == 1 and len(piece.upper()) == 1]
    capitals = [capital for capital in capitals if capital.lower() != capital]
    missing = [capital for capital in capitals if capital not in known]
    if 2 * len(missing) <= len(capitals):
        return None
    remedy = 'set "lowercase" of its normalizer to true' if is_json else "leave out --cased"
    return (
        f"looks uncased: of its {len(capitals):,} letters {len(missing):,} have no capital ({_some(missing)}), and "
        f"a word with such a capital becomes [UNK]; {remedy}, or take a cased vocabulary"
    )


def _find_unreachable(pieces: list[str], is_json: bool) -> str | None:
    """The lower-cased text gives no capitals; without a tokenizer.json that may say otherwise, no accents either."""
    with_capitals = [piece for piece in pieces if piece.lower() != piece]
    unreachable = with_capitals if is_json else [piece for piece in pieces if _fold(piece) != piece]
    if len(unreachable) <= _MOST_UNREACHABLE * len(pieces):
        return None
    share = f"{len(unreachable):,} of its {len(pieces):,} pieces ({100 * len(unreachable) / len(pieces):.1f} %)"
    if not with_capitals:
        return (
            f"{share} have accents ({_some(unreachable)}), and no text gives them, since accents are taken off; give a "
            'tokenizer.json whose BertNormalizer has "strip_accents": false, or take a vocabulary without accents'
        )
    remedy = 'set "lowercase" of its normalizer to false' if is_json else "add --cased"
    return (
        f"looks cased: {share} have capitals{'' if is_json else ' or accents'} ({_some(unreachable)}), and no text "
        f"gives them, since it is lower-cased; {remedy}, or take an uncased vocabulary"
    )


def _fold(text: str) -> str:
    """As BERT's normaliser: without accents, lower case."""
    plain = "".join(char for char in unicodedata.normalize("NFD", text) if unicodedata.category(char) != "Mn")
    return plain.lower()


def _some(pieces: list[str]) -> str:
    return ", ".join(pieces[:3]) + (", ..." if len(pieces) > 3 else "")
