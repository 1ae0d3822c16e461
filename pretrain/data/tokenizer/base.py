"""The common base of all tokenizers: their interface, special tokens, and how they are saved for transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.tokenizer.folder import write_folder
from pretrain.data.tokenizer.info import SpecialIds, TokenizerInfo
from pretrain.data.tokenizer.saved_pipeline import complete_pipeline, settings_of
from pretrain.errors import DataError

# Names by role, in order of preference; the first that is in the vocabulary is used.
SPECIAL_NAMES = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}


class Tokenizer(ABC):
    """A vocabulary with its rules; `info` goes into manifests, and equal `info.sha256` means equal ids.

    Attributes:
        info: kind, name, hash, size, casing and special ids.
        vocab_size: number of ids, special ones included.
        special: ids of the five special tokens.
        dtype: the narrowest that holds all ids, `best_dtype(vocab_size)`.
    """

    def __init__(self, info: TokenizerInfo, source: bytes, pieces: Sequence[str]) -> None:
        self.info = info
        self.vocab_size = info.vocab_size
        self.special = info.special
        self.dtype = best_dtype(info.vocab_size)
        self._source = source
        self._pieces = pieces

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without [CLS] and [SEP], from the reference library of its kind."""

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts, concatenated (`best_dtype(vocab_size)`), and their number per text (int64).

        The ids are the same as those from `encode_batch`.

        Raises:
            DataError: a text cannot be written as UTF-8; says which and where.
        """
        try:
            return self._encode(texts)
        except (UnicodeEncodeError, TypeError):  # sentencepiece raises TypeError for the same fault
            check_utf8(texts)
            raise

    def _encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return join_ids(self.encode_batch(texts), self.dtype)

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, as normalised by the tokenizer; special tokens appear by name."""

    @abstractmethod
    def continues_word(self) -> np.ndarray:
        """Bool [vocab_size]: whether a piece continues the word of the piece before it."""

    @abstractmethod
    def _to_tokenizers(self) -> Any:
        """The `tokenizers.Tokenizer` with the same ids, for transformers."""

    def piece(self, index: int) -> str:
        """The piece with id `index` as written in the vocabulary, with its word-boundary marks."""
        return self._pieces[index]

    def special_ids(self) -> list[int]:
        """Every id that is not ordinary text, ascending."""
        return sorted(set(asdict(self.special).values()))

    def save_pretrained(self, folder: str | Path, *, max_length: int | None = None) -> None:
        """Writes the files that `transformers.AutoTokenizer` and `load_tokenizer` load from `folder`.

        They give the ids of this tokenizer, and with special tokens those of a training row: [CLS] text [SEP].
        `max_length`, in tokens, is where transformers truncates if truncation is requested; never without it.

        Raises:
            DataError: a file cannot be written, or the vocabulary cannot be converted for transformers with the same
                ids.
        """
        tokens = {role: self._pieces[index] for role, index in asdict(self.special).items()}
        pipeline = self._to_tokenizers()
        complete_pipeline(pipeline, self.info.name, tokens, self.special)
        text = pipeline.to_str(pretty=True)
        config: dict[str, Any] = {f"{role}_token": token for role, token in tokens.items()} | settings_of(text)
        if max_length is not None:
            config["model_max_length"] = max_length
        write_folder(Path(folder), self.info, self._source, text, config)


def join_ids(batch: Sequence[Sequence[int]], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The lists of `batch`, concatenated, and their lengths (int64)."""
    lengths = np.fromiter(map(len, batch), np.int64, len(batch))
    return np.fromiter(chain.from_iterable(batch), dtype, int(lengths.sum())), lengths


def check_utf8(texts: Sequence[str]) -> None:
    """Raises DataError for the first text with a lone surrogate (JSON can spell one), TypeError for another type."""
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {number} of {len(texts)}: expected str, found {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"text {number} of {len(texts)}: character {error.start} is U+{ord(text[error.start]):04X}, half of a "
                "surrogate pair, which no UTF-8 text can hold; take it out of the corpus or replace it by U+FFFD"
            ) from None


def find_special(path: Path, vocab: Mapping[str, int], names: Mapping[str, Sequence[str]]) -> SpecialIds:
    """The ids of the five special tokens: for each role, that of the first of its `names` in `vocab`.

    Raises:
        DataError: a role has none.
    """
    ids = {role: next((vocab[name] for name in choices if name in vocab), None) for role, choices in names.items()}
    missing = [" or ".join(names[role]) for role, index in ids.items() if index is None]
    if missing:
        raise DataError(
            f"{path}: the vocabulary of {len(vocab)} pieces lacks {', '.join(missing)}, which BERT needs; add "
            "them, or train a vocabulary with `taco data train-tokenizer`"
        )
    return SpecialIds(**{role: index for role, index in ids.items() if index is not None})


def check_casing(path: Path, cased: bool, is_cased: bool) -> None:
    """Raises DataError if `cased` was requested of a tokenizer that folds case."""
    if cased and not is_cased:
        raise DataError(f"{path}: `cased` was asked for, but this tokenizer folds case itself; take another one")


def best_dtype(vocab_size: int) -> np.dtype:
    """The narrowest dtype that Megatron would choose: uint16 for vocabularies below 65,500, else int32."""
    return np.dtype("<u2" if vocab_size < 65_500 else "<i4")
