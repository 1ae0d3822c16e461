"""BERT's WordPiece over a `vocab.txt`: ids from C++, and the same ids from the `tokenizers` library.

The C++ encoder (csrc/include/taco/wordpiece.hpp) gives the library's ids many times faster. The library decodes, saves
and is the reference in tests; it is imported only then.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.native import native
from pretrain.data.tokenizer.base import SPECIAL_NAMES, Tokenizer, find_special
from pretrain.data.tokenizer.info import TokenizerInfo
from pretrain.errors import DataError

WORDPIECE_SPECIAL = tuple(names[0] for names in SPECIAL_NAMES.values())
MAX_WORD_CHARACTERS = 100
_BOM = b"\xef\xbb\xbf"
# Longer texts are passed to the library in parts: it needs about a hundred times the text's memory.
_PART_CHARACTERS = 1 << 20
_WORD_START = re.compile(r"[ \n\u4e00-\u9fff]")


class WordPieceEncoder:
    """Texts to ids in C++. Threads may share one: each encoding thread needs 3 to 5 MB besides the vocabulary."""

    def __init__(
        self,
        vocab: Mapping[str, int],
        special: Mapping[str, int],
        dtype: np.dtype,
        *,
        unknown: str = "[UNK]",
        cased: bool,
        max_word_characters: int = MAX_WORD_CHARACTERS,
    ) -> None:
        """Takes pieces and special tokens with their ids, which must all fit `dtype` (uint16 or int32).

        Raises:
            MissingExtensionError: the extension is not built.
            ValueError: an id does not fit `dtype`, or a special token is not written as [NAME].
        """
        pieces = [""] * (max(vocab.values()) + 1)
        for piece, index in vocab.items():
            pieces[index] = piece
        kind = native().WordPiece16 if dtype.itemsize == 2 else native().WordPiece32
        self._native = kind(
            pieces=pieces,
            special=list(special.items()),
            unknown_id=vocab[unknown],
            is_cased=cased,
            max_word_characters=max_word_characters,
        )

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """As `Tokenizer.encode`. Raises UnicodeEncodeError for a lone surrogate."""
        return self._native.encode(texts)


class WordPieceTokenizer(Tokenizer):
    """BERT's WordPiece over a `vocab.txt`, one piece per line."""

    def __init__(self, info: TokenizerInfo, source: bytes, vocab: Mapping[str, int]) -> None:
        super().__init__(info, source, list(vocab))
        self._vocab = vocab

    @cached_property
    def _pipeline(self) -> Any:
        return wordpiece_pipeline(dict(self._vocab), self.info.cased)

    @cached_property
    def _encoder(self) -> WordPieceEncoder:
        special = {token: self._vocab[token] for token in WORDPIECE_SPECIAL}
        return WordPieceEncoder(self._vocab, special, self.dtype, cased=self.info.cased)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As `Tokenizer.encode_batch`; texts of millions of characters in bounded memory."""
        if all(len(text) <= _PART_CHARACTERS for text in texts):
            return [encoding.ids for encoding in self._pipeline.encode_batch_fast(texts, add_special_tokens=False)]
        return [self._encode_parts(text) for text in texts]

    def _encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return self._encoder.encode(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """As `Tokenizer.decode`."""
        return self._pipeline.decode(list(ids), skip_special_tokens=False)

    def continues_word(self) -> np.ndarray:
        """As `Tokenizer.continues_word`: the pieces that begin with ##."""
        return np.array([piece.startswith("##") and len(piece) > 2 for piece in self._pieces], bool)

    def _encode_parts(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in _split_long(text):
            ids += self._pipeline.encode_batch_fast([part], add_special_tokens=False)[0].ids
        return ids

    def _to_tokenizers(self) -> Any:
        return wordpiece_pipeline(dict(self._vocab), self.info.cased)


def load_wordpiece(path: Path, name: str, data: bytes, cased: bool) -> Tokenizer:
    """The tokenizer of a `vocab.txt` that holds `data`. Raises DataError as `load_tokenizer`."""
    vocab = _parse_vocab(path, data)
    special = find_special(path, vocab, {role: names[:1] for role, names in SPECIAL_NAMES.items()})
    digest = hashlib.sha256(data + (b"\0cased" if cased else b"")).hexdigest()
    return WordPieceTokenizer(TokenizerInfo("wordpiece", name, digest, len(vocab), cased, special), data, vocab)


def _parse_vocab(path: Path, data: bytes) -> dict[str, int]:
    """Pieces with their ids (line numbers from 0), in order."""
    try:
        # Not splitlines: U+2028 and the like are pieces of real vocabularies.
        lines = data.decode("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; a vocab.txt holds one piece per line") from None
    if data.startswith(_BOM):
        raise DataError(
            f"{path}: begins with a byte-order mark, which would belong to its first piece; remove it, for example "
            f"with `tail -c +{len(_BOM) + 1} {shlex.quote(str(path))} > {shlex.quote(f'{path.stem}.new.txt')}`"
        )
    vocab: dict[str, int] = {}
    for index, line in enumerate(lines):
        piece = line.removesuffix("\r")
        if not piece:
            raise DataError(f"{path}:{index + 1}: empty line; every line is a piece and its number an id")
        if piece in vocab:
            raise DataError(f"{path}:{index + 1}: {piece!r} is already in line {vocab[piece] + 1}; remove one")
        vocab[piece] = index
    return vocab


def wordpiece_pipeline(vocab: dict[str, int], cased: bool) -> Any:
    """The pipeline of transformers' BertTokenizerFast: a text that spells a special token contains that token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pipeline = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=MAX_WORD_CHARACTERS))
    pipeline.normalizer = normalizers.BertNormalizer(lowercase=not cased)
    pipeline.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pipeline.decoder = decoders.WordPiece(prefix="##")
    pipeline.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in WORDPIECE_SPECIAL])
    return pipeline


def _split_long(text: str) -> Iterator[str]:
    """Parts of about `_PART_CHARACTERS`, cut before a space, line end or ideograph, all of which end a word."""
    start = 0
    while len(text) - start > _PART_CHARACTERS:
        cut = _WORD_START.search(text, start + _PART_CHARACTERS)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]
