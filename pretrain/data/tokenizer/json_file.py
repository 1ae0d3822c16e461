"""Pipelines of Hugging Face's `tokenizers`, from a `tokenizer.json`.

A file that describes BERT's WordPiece exactly is encoded by our own WordPiece, any other by the library.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.tokenizer.base import SPECIAL_NAMES, Tokenizer, check_casing, find_special
from pretrain.data.tokenizer.info import TokenizerInfo
from pretrain.data.tokenizer.long_texts import encode_in_parts
from pretrain.data.tokenizer.wordpiece import WordPieceEncoder
from pretrain.errors import DataError

# Real vocabularies have small gaps in their ids, such as before added tokens.
_IDS_PER_PIECE, _SPARE_IDS = 2, 1024


class JsonTokenizer(Tokenizer):
    """Any pipeline of Hugging Face's `tokenizers`, from a `tokenizer.json`."""

    def __init__(self, info: TokenizerInfo, source: bytes, pipeline: Any, pieces: Sequence[str]) -> None:
        super().__init__(info, source, pieces)
        self._pipeline = pipeline
        self._fields: dict[str, Any] = json.loads(source)

    @property
    def is_wordpiece(self) -> bool:
        """Whether the model of the file is WordPiece, in which ## continues a word."""
        return self._fields["model"].get("type") == "WordPiece"

    @cached_property
    def _encoder(self) -> WordPieceEncoder | None:
        return wordpiece_encoder(self._fields, self._pipeline.token_to_id, self.dtype)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As `Tokenizer.encode_batch`; truncation and padding configured in the file are not applied."""
        return [encoding.ids for encoding in self._pipeline.encode_batch_fast(texts, add_special_tokens=False)]

    def _encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return encode_in_parts(texts, super()._encode) if self._encoder is None else self._encoder.encode(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """As `Tokenizer.decode`."""
        return self._pipeline.decode(list(ids), skip_special_tokens=False)

    def continues_word(self) -> np.ndarray:
        """As `Tokenizer.continues_word`: by ## if the model is WordPiece, else by the marks of a space."""
        if self.is_wordpiece:
            continues = np.array([piece.startswith("##") and len(piece) > 2 for piece in self._pieces], bool)
        else:
            continues = np.array([not piece.startswith(("\u2581", "\u0120", "\u010a")) for piece in self._pieces], bool)
        continues[self.special_ids()] = False
        return continues

    def special_ids(self) -> list[int]:
        """As `Tokenizer.special_ids`, with every added token that the file marks as special."""
        added = [index for index, token in self._pipeline.get_added_tokens_decoder().items() if token.special]
        return sorted({*super().special_ids(), *added})

    def _to_tokenizers(self) -> Any:
        from tokenizers import Tokenizer as Pipeline

        return Pipeline.from_str(self._pipeline.to_str())


def load_json(path: Path, name: str, data: bytes, cased: bool) -> Tokenizer:
    """The tokenizer of a `tokenizer.json` that holds `data`. Raises DataError as `load_tokenizer`."""
    from tokenizers import Tokenizer as Pipeline

    _check_ids(path, data)
    try:
        pipeline = Pipeline.from_str(data.decode("utf-8"))
    except Exception as error:  # noqa: BLE001 - the library raises plain Exception, nothing narrower
        raise DataError(f"{path}: is not a tokenizer.json ({error}); restore it") from None
    pipeline.no_truncation()
    pipeline.no_padding()
    if getattr(pipeline.model, "dropout", None):
        pipeline.model.dropout = None  # it would give other ids each time
    is_cased = not _folds_case(json.loads(data).get("normalizer"))
    check_casing(path, cased, is_cased)
    vocab = pipeline.get_vocab(with_added_tokens=True)
    special = find_special(path, vocab, SPECIAL_NAMES)
    _check_unknown(path, pipeline)
    pieces = [""] * (max(vocab.values()) + 1)
    for piece, index in vocab.items():
        pieces[index] = piece
    info = TokenizerInfo("tokenizer.json", name, hashlib.sha256(data).hexdigest(), len(pieces), is_cased, special)
    return JsonTokenizer(info, data, pipeline, pieces)


def _check_unknown(path: Path, pipeline: Any) -> None:
    """Refuses a pipeline that fails at text outside its vocabulary, as one whose unk_token is no piece does."""
    try:
        pipeline.encode("a \U00016800 \U00010300", add_special_tokens=False)
    except Exception as error:  # noqa: BLE001 - the library raises plain Exception, nothing narrower
        raise DataError(
            f"{path}: cannot encode text outside its vocabulary ({error}); name one of its pieces as unk_token of model"
        ) from None


def _check_ids(path: Path, data: bytes) -> None:
    """Refuses ids that two pieces share, and ids far above the number of pieces, before tables of that size are made.

    A file of another shape than a tokenizer.json is left to the library, whose message says what is wrong with it.
    """
    try:
        fields = json.loads(data)
        vocab, added = fields["model"]["vocab"], fields.get("added_tokens") or []
        pieces = list(vocab.items()) if isinstance(vocab, dict) else [(row[0], i) for i, row in enumerate(vocab)]
        pieces += [(token["content"], token["id"]) for token in added]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return
    owners: dict[int, str] = {}
    limit = _IDS_PER_PIECE * len(pieces) + _SPARE_IDS
    for piece, index in pieces:
        if not isinstance(index, int) or not isinstance(piece, str):
            return
        if not 0 <= index < limit:
            raise DataError(
                f"{path}: the piece {piece!r} has the id {index:,}, but there are {len(pieces):,} pieces; an embedding "
                "has a row for every id up to the largest, so number the pieces without such gaps"
            )
        if owners.setdefault(index, piece) != piece:
            raise DataError(
                f"{path}: the pieces {owners[index]!r} and {piece!r} share the id {index}; give one a new id"
            )


def _folds_case(normalizer: Any) -> bool:
    """Whether a normalizer of a tokenizer.json, or one inside it, lowercases."""
    if not isinstance(normalizer, dict):
        return False
    if normalizer.get("type") == "Sequence":
        return any(_folds_case(step) for step in normalizer.get("normalizers", []))
    return normalizer.get("type") == "Lowercase" or bool(normalizer.get("lowercase"))


def wordpiece_encoder(fields: dict[str, Any], id_of: Callable[[str], int], dtype: np.dtype) -> WordPieceEncoder | None:
    """The encoder with the same ids if the `fields` of a tokenizer.json are those of BERT's WordPiece; else None.

    `id_of` returns the ids of added tokens: the library ignores those in the file.
    """
    model, normalizer = fields["model"], fields.get("normalizer")
    if not isinstance(normalizer, dict) or fields.get("pre_tokenizer") != {"type": "BertPreTokenizer"}:
        return None
    lowercase = normalizer.get("lowercase")
    bert_normalizer = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": lowercase if normalizer.get("strip_accents") is not None else None,
        "lowercase": lowercase,
    }
    if normalizer != bert_normalizer or not isinstance(lowercase, bool) or not _is_bert_model(model):
        return None
    tokens: list[dict[str, Any]] = fields.get("added_tokens") or []
    if not all(_is_plain(token) for token in tokens):
        return None
    return WordPieceEncoder(
        model["vocab"],
        {token["content"]: id_of(token["content"]) for token in tokens},
        dtype,
        unknown=model["unk_token"],
        cased=not lowercase,
        max_word_characters=model["max_input_chars_per_word"],
    )


def _is_bert_model(model: dict[str, Any]) -> bool:
    keys = {"type", "unk_token", "continuing_subword_prefix", "max_input_chars_per_word", "vocab"}
    if model.keys() != keys or model["type"] != "WordPiece" or model["continuing_subword_prefix"] != "##":
        return False
    ids = set(model["vocab"].values())
    is_dense = len(ids) == len(model["vocab"]) and max(ids, default=0) < 2 * len(ids) + 1000
    return is_dense and model["unk_token"] in model["vocab"] and 16 <= model["max_input_chars_per_word"] <= 1000


def _is_plain(token: dict[str, Any]) -> bool:
    """Whether an added token is matched as written, between words and not inside another one."""
    text = token["content"]
    is_bracketed = len(text) > 1 and text[0] == "[" and text[-1] == "]" and text.count("[") == 1
    return is_bracketed and not any(token[name] for name in ("single_word", "lstrip", "rstrip", "normalized"))
