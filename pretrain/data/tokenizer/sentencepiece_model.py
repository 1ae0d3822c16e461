"""SentencePiece models: loading, encoding, training. The only module that imports the sentencepiece library."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.tokenizer.base import Tokenizer, check_casing
from pretrain.data.tokenizer.info import SpecialIds, TokenizerInfo
from pretrain.data.tokenizer.long_texts import encode_in_parts
from pretrain.data.tokenizer.sentencepiece_convert import BYTE, CONTROL, NORMAL, USER_DEFINED, convert
from pretrain.errors import DataError, VocabularySizeError

SENTENCEPIECE_SPECIAL = ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")
# SentencePiece silently skips longer lines; the order of its sums depends on the number of threads.
_MAX_LINE_BYTES, _TRAINING_THREADS = 1 << 20, 4


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`; special tokens that it lacks are appended after its last piece."""

    def __init__(self, info: TokenizerInfo, source: bytes, processor: Any, model: Any, appended: Sequence[str]) -> None:
        super().__init__(info, source, [piece.piece for piece in model.pieces] + list(appended))
        self._processor, self._model, self._appended = processor, model, appended

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As `Tokenizer.encode_batch`; a text that spells a special token is still only text."""
        return self._processor.encode(list(texts), num_threads=1)

    def _encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return encode_in_parts(texts, self._encode_whole)

    def _encode_whole(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        # With arrays the library creates no Python object per id.
        arrays = self._processor.encode(list(texts), num_threads=1, return_type="numpy")
        lengths = np.fromiter(map(len, arrays), np.int64, len(arrays))
        return np.concatenate([*arrays, np.empty(0, np.int32)]).astype(self.dtype), lengths

    def decode(self, ids: Sequence[int]) -> str:
        """As `Tokenizer.decode`."""
        special = set(self.special_ids()) - {self.special.unk}
        words: list[str] = []
        for is_special, group in groupby(ids, key=special.__contains__):
            run = list(group)
            words += [self._pieces[index] for index in run] if is_special else [self._processor.decode(run)]
        return " ".join(words)

    def continues_word(self) -> np.ndarray:
        """As `Tokenizer.continues_word`: text pieces that do not begin with the mark of a space."""
        text_types = (NORMAL, USER_DEFINED, BYTE)
        continues = [piece.type in text_types and not piece.piece.startswith("\u2581") for piece in self._model.pieces]
        return np.array(continues + [False] * len(self._appended), bool)

    def special_ids(self) -> list[int]:
        """As `Tokenizer.special_ids`, with all control pieces of the model."""
        control = [index for index, piece in enumerate(self._model.pieces) if piece.type == CONTROL]
        return sorted({*super().special_ids(), *control})

    def _to_tokenizers(self) -> Any:
        return convert(self._model, self._appended, self._processor, self.info.name)


def load_sentencepiece(path: Path, name: str, data: bytes, cased: bool) -> Tokenizer:
    """The tokenizer of a `.model` file that holds `data`. Raises DataError as `load_tokenizer`."""
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    try:
        processor = SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise DataError(f"{path}: is not a SentencePiece model ({error}); restore it or train it again") from None
    model = sentencepiece_model_pb2.ModelProto.FromString(data)
    is_cased = not model.normalizer_spec.name.endswith("_cf")
    check_casing(path, cased, is_cased)
    vocab = {piece.piece: index for index, piece in enumerate(model.pieces)}
    given = {"<unk>": processor.unk_id(), **({"<pad>": processor.pad_id()} if processor.pad_id() >= 0 else {})}
    ids = vocab | given
    appended = [piece for piece in SENTENCEPIECE_SPECIAL if piece not in ids]
    ids |= {piece: len(model.pieces) + number for number, piece in enumerate(appended)}
    special = SpecialIds(*(ids[piece] for piece in SENTENCEPIECE_SPECIAL))
    size, digest = len(model.pieces) + len(appended), hashlib.sha256(data).hexdigest()
    info = TokenizerInfo("sentencepiece", name, digest, size, is_cased, special)
    return SentencePieceTokenizer(info, data, processor, model, appended)


def train_sentencepiece(lines: Iterator[str], **options: Any) -> bytes:
    """The bytes of a model learnt from `lines` with SentencePiece's `options`; prints nothing, deterministic.

    Its first pieces are <pad> <unk> [CLS] [SEP] [MASK].

    Raises:
        VocabularySizeError: SentencePiece refuses the vocabulary size for this text; it names another, untried.
        DataError: it learns nothing from the text; also any DataError raised by `lines`.
    """
    from sentencepiece import SentencePieceTrainer

    model, failures = io.BytesIO(), []

    def guarded() -> Iterator[str]:
        # The library would turn an exception in its iterator into a RuntimeError with only its text.
        try:
            yield from lines
        except DataError as error:
            failures.append(error)

    try:
        SentencePieceTrainer.train(
            sentence_iterator=guarded(),
            model_writer=model,
            minloglevel=4,
            num_threads=_TRAINING_THREADS,
            max_sentence_length=_MAX_LINE_BYTES,
            pad_id=0,
            unk_id=1,
            bos_id=-1,
            eos_id=-1,
            pad_piece=SENTENCEPIECE_SPECIAL[0],
            unk_piece=SENTENCEPIECE_SPECIAL[1],
            control_symbols=list(SENTENCEPIECE_SPECIAL[2:]),
            **options,
        )
    except RuntimeError as error:
        if not failures:
            raise _explain_training(error, options["vocab_size"]) from None
    if failures:
        raise failures[0]
    return model.getvalue()


def _explain_training(error: RuntimeError, vocab_size: int) -> DataError:
    """SentencePiece's message in terms of `--vocab-size`, without source file, line and C++ condition."""
    message = str(error).rpartition("] ")[2]
    prefix = "SentencePiece cannot learn from this text"
    if match := re.search(r"size too high \((\d+)\)\D+(\d+)", message):
        return VocabularySizeError(f"{prefix}: vocab size {match[1]} is too large for it", vocab_size, int(match[2]))
    if match := re.search(r"smaller than required_chars\. (\d+) vs (\d+)", message):
        what = f"{prefix}: vocab size {match[1]} has no room for its characters"
        return VocabularySizeError(what, vocab_size, int(match[2]) + 1)
    return DataError(f"{prefix}: {message or 'it holds no sentence'}")
