"""Text to token ids: WordPiece vocabularies, SentencePiece models and `tokenizer.json` files behind one class.

It stands at the very start of the flow: preprocessing encodes with it, training takes special ids and word boundaries
from it, export writes it beside the model. Ids are those of the reference library (transformers' BertTokenizerFast,
sentencepiece, tokenizers). The libraries are imported when a tokenizer is loaded; torch never is.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.dataset_format import best_dtype
from pretrain.data.manifest import SpecialIds, TokenizerInfo
from pretrain.data.sentencepiece_convert import BYTE, CONTROL, NORMAL, USER_DEFINED, convert
from pretrain.data.tokenizer_folder import read_folder, write_folder
from pretrain.errors import DataError

# Names by role, the preferred one first; the first that a vocabulary holds is taken.
SPECIAL_NAMES = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}
WORDPIECE_SPECIAL = tuple(names[0] for names in SPECIAL_NAMES.values())
SENTENCEPIECE_SPECIAL = ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")
# A longer text is encoded in parts: the library's memory is about a hundred times the text.
_PART_CHARACTERS = 1 << 20
# SentencePiece leaves out longer lines without a word; the order of its sums depends on the number of threads.
_MAX_LINE_BYTES, _TRAINING_THREADS = 1 << 20, 4
_WORD_START = re.compile(r"[ \n\u4e00-\u9fff]")


class Tokenizer(ABC):
    """A vocabulary with its rules; `info` goes into manifests, equal `info.sha256` means equal ids.

    Attributes:
        info: kind, name, hash, size, casing and special ids.
        vocab_size: number of ids, special ones included.
        special: ids of the five special tokens.
    """

    def __init__(self, info: TokenizerInfo, source: bytes, pieces: Sequence[str]) -> None:
        self.info = info
        self.vocab_size = info.vocab_size
        self.special = info.special
        self._source = source
        self._pieces = pieces

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without [CLS] and [SEP], however long the text is."""

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """All ids of `encode_batch` one after the other, in `best_dtype(vocab_size)`, and int64 ids per text."""
        encoded = self.encode_batch(texts)
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        ids = np.fromiter(chain.from_iterable(encoded), best_dtype(self.vocab_size), int(lengths.sum()))
        return ids, lengths

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, normalised as the tokenizer does; special tokens appear by name."""

    @abstractmethod
    def continues_word(self) -> np.ndarray:
        """Bool [vocab_size]: whether a piece goes on with the word of the piece before it."""

    @abstractmethod
    def _to_tokenizers(self) -> Any:
        """The `tokenizers.Tokenizer` with the same ids, for transformers."""

    def piece(self, index: int) -> str:
        """The piece with id `index` as it stands in the vocabulary, with the marks of word boundaries."""
        return self._pieces[index]

    def special_ids(self) -> list[int]:
        """Every id that is no ordinary text, ascending."""
        return sorted(set(asdict(self.special).values()))

    def save_pretrained(self, folder: str | Path, *, max_length: int | None = None) -> None:
        """Writes what `transformers.AutoTokenizer` and `load_tokenizer` load from `folder`.

        `max_length`, in tokens, is where transformers truncates when asked to truncate.

        Raises:
            DataError: a file cannot be written, or the vocabulary cannot be given to transformers with the same ids.
        """
        from tokenizers import AddedToken, processors

        tokens = {role: self._pieces[index] for role, index in asdict(self.special).items()}
        pipeline = self._to_tokenizers()
        pipeline.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens.values()])
        if pipeline.post_processor is None:
            cls, sep = tokens["cls"], tokens["sep"]
            pipeline.post_processor = processors.TemplateProcessing(
                single=f"{cls}:0 $A:0 {sep}:0",
                pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
                special_tokens=[(cls, self.special.cls), (sep, self.special.sep)],
            )
        write_folder(Path(folder), self.info, self._source, pipeline.to_str(pretty=True), tokens, max_length)


class WordPieceTokenizer(Tokenizer):
    """BERT's WordPiece over a `vocab.txt`, one piece per line."""

    def __init__(self, info: TokenizerInfo, source: bytes, vocab: Mapping[str, int]) -> None:
        super().__init__(info, source, list(vocab))
        self._pipeline = wordpiece_pipeline(dict(vocab), info.cased)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As `Tokenizer.encode_batch`; texts of millions of characters in bounded memory."""
        if all(len(text) <= _PART_CHARACTERS for text in texts):
            return [item.ids for item in self._pipeline.encode_batch_fast(texts, add_special_tokens=False)]
        return [self._encode_parts(text) for text in texts]

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
        return wordpiece_pipeline({piece: index for index, piece in enumerate(self._pieces)}, self.info.cased)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`; special tokens that it lacks follow after its last piece."""

    def __init__(self, info: TokenizerInfo, source: bytes, processor: Any, model: Any, appended: Sequence[str]) -> None:
        super().__init__(info, source, [piece.piece for piece in model.pieces] + list(appended))
        self._processor, self._model, self._appended = processor, model, appended

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As `Tokenizer.encode_batch`; a text that spells a special token is still only text."""
        return self._processor.encode(list(texts), num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        """As `Tokenizer.decode`."""
        special = set(self.special_ids()) - {self.special.unk}
        words: list[str] = []
        for is_special, group in groupby(ids, key=special.__contains__):
            run = list(group)
            words += [self._pieces[index] for index in run] if is_special else [self._processor.decode(run)]
        return " ".join(words)

    def continues_word(self) -> np.ndarray:
        """As `Tokenizer.continues_word`: text pieces that do not begin with the blank's mark."""
        text_types = (NORMAL, USER_DEFINED, BYTE)
        found = [piece.type in text_types and not piece.piece.startswith("\u2581") for piece in self._model.pieces]
        return np.array(found + [False] * len(self._appended), bool)

    def special_ids(self) -> list[int]:
        """As `Tokenizer.special_ids`, with all control pieces of the model."""
        control = [index for index, piece in enumerate(self._model.pieces) if piece.type == CONTROL]
        return sorted({*super().special_ids(), *control})

    def _to_tokenizers(self) -> Any:
        return convert(self._model, self._appended, self._processor, self.info.name)


class JsonTokenizer(Tokenizer):
    """Any pipeline of Hugging Face's `tokenizers`, from a `tokenizer.json`."""

    def __init__(self, info: TokenizerInfo, source: bytes, pipeline: Any, pieces: Sequence[str]) -> None:
        super().__init__(info, source, pieces)
        self._pipeline = pipeline

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As `Tokenizer.encode_batch`; truncation and padding that the file asks for are not applied."""
        return [item.ids for item in self._pipeline.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """As `Tokenizer.decode`."""
        return self._pipeline.decode(list(ids), skip_special_tokens=False)

    def continues_word(self) -> np.ndarray:
        """As `Tokenizer.continues_word`: by ## where the model is WordPiece, else by the marks of a blank."""
        if json.loads(self._source)["model"].get("type") == "WordPiece":
            found = np.array([piece.startswith("##") and len(piece) > 2 for piece in self._pieces], bool)
        else:
            found = np.array([not piece.startswith(("\u2581", "\u0120", "\u010a")) for piece in self._pieces], bool)
        found[self.special_ids()] = False
        return found

    def special_ids(self) -> list[int]:
        """As `Tokenizer.special_ids`, with every added token that the file marks as special."""
        added = [index for index, token in self._pipeline.get_added_tokens_decoder().items() if token.special]
        return sorted({*super().special_ids(), *added})

    def _to_tokenizers(self) -> Any:
        from tokenizers import Tokenizer as Pipeline

        return Pipeline.from_str(self._pipeline.to_str())


def load_tokenizer(path: str | Path, *, cased: bool = False) -> Tokenizer:
    """The tokenizer of `path`: a WordPiece `vocab.txt`, a SentencePiece `.model`, a `tokenizer.json`, or a folder.

    A folder is what `save_pretrained` wrote. `cased` keeps capitals and accents of a `vocab.txt`; the other kinds
    decide that themselves, and asking for it where they fold case is an error. `info.sha256` is that of the file's
    bytes; a cased `vocab.txt` hashes the bytes followed by b"\\0cased", since its ids differ.

    Raises:
        DataError: the file is missing, of an unknown kind, damaged, or lacks what BERT needs.
    """
    source, name = Path(path), Path(path).name
    if source.is_dir():
        source, name, kept_cased = read_folder(source)
        if source.suffix == ".txt":
            _check_casing(source, cased, kept_cased)
            cased = kept_cased
    data = _read(source)
    if source.suffix == ".model":
        return _load_sentencepiece(source, name, data, cased)
    if source.suffix == ".json":
        return _load_json(source, name, data, cased)
    if source.suffix == ".txt":
        return _load_wordpiece(source, name, data, cased)
    raise DataError(f"{path}: unknown kind of tokenizer; give a vocab.txt, a SentencePiece .model or a tokenizer.json")


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: the tokenizer cannot be read: {error.strerror}") from None
    if not data:
        raise DataError(f"{path}: the tokenizer file is empty; restore it or train one (`taco data train-tokenizer`)")
    return data


def _load_wordpiece(path: Path, name: str, data: bytes, cased: bool) -> Tokenizer:
    vocab = _parse_vocab(path, data)
    special = _find_special(path, vocab, {role: names[:1] for role, names in SPECIAL_NAMES.items()})
    digest = hashlib.sha256(data + (b"\0cased" if cased else b"")).hexdigest()
    return WordPieceTokenizer(TokenizerInfo("wordpiece", name, digest, len(vocab), cased, special), data, vocab)


def _parse_vocab(path: Path, data: bytes) -> dict[str, int]:
    """Pieces with their ids, that is line numbers from 0, in order."""
    try:
        # Not splitlines: U+2028 and its kin are pieces of real vocabularies.
        lines = data.decode("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; a vocab.txt holds one piece per line") from None
    vocab: dict[str, int] = {}
    for index, line in enumerate(lines):
        piece = line.removesuffix("\r")
        if not piece:
            raise DataError(f"{path}:{index + 1}: empty line; every line is a piece and its number an id")
        if piece in vocab:
            raise DataError(f"{path}:{index + 1}: {piece!r} stands in line {vocab[piece] + 1} already; remove one")
        vocab[piece] = index
    return vocab


def _find_special(path: Path, vocab: Mapping[str, int], names: Mapping[str, Sequence[str]]) -> SpecialIds:
    found = {role: next((vocab[name] for name in known if name in vocab), None) for role, known in names.items()}
    missing = [" or ".join(names[role]) for role, index in found.items() if index is None]
    if missing:
        raise DataError(
            f"{path}: the vocabulary of {len(vocab)} pieces lacks {', '.join(missing)}; BERT needs padding, unknown, "
            "[CLS], [SEP] and [MASK]: add them, or train a vocabulary with `taco data train-tokenizer`"
        )
    return SpecialIds(**{role: index for role, index in found.items() if index is not None})


def wordpiece_pipeline(vocab: dict[str, int], cased: bool) -> Any:
    """What transformers' BertTokenizerFast builds: a text that spells a special token holds that token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pipeline = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    pipeline.normalizer = normalizers.BertNormalizer(lowercase=not cased)
    pipeline.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pipeline.decoder = decoders.WordPiece(prefix="##")
    pipeline.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in WORDPIECE_SPECIAL])
    return pipeline


def _split_long(text: str) -> Iterator[str]:
    """Parts of about `_PART_CHARACTERS`, cut before a blank, a line end or an ideograph, where every word ends."""
    start = 0
    while len(text) - start > _PART_CHARACTERS:
        cut = _WORD_START.search(text, start + _PART_CHARACTERS)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _load_sentencepiece(path: Path, name: str, data: bytes, cased: bool) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    try:
        processor = SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise DataError(f"{path}: is not a SentencePiece model ({error}); restore it or train it again") from None
    model = sentencepiece_model_pb2.ModelProto.FromString(data)
    is_cased = not model.normalizer_spec.name.endswith("_cf")
    _check_casing(path, cased, is_cased)
    vocab = {piece.piece: index for index, piece in enumerate(model.pieces)}
    given = {"<unk>": processor.unk_id(), **({"<pad>": processor.pad_id()} if processor.pad_id() >= 0 else {})}
    known = vocab | given
    appended = [piece for piece in SENTENCEPIECE_SPECIAL if piece not in known]
    known |= {piece: len(model.pieces) + number for number, piece in enumerate(appended)}
    special = SpecialIds(*(known[piece] for piece in SENTENCEPIECE_SPECIAL))
    size, digest = len(model.pieces) + len(appended), hashlib.sha256(data).hexdigest()
    info = TokenizerInfo("sentencepiece", name, digest, size, is_cased, special)
    return SentencePieceTokenizer(info, data, processor, model, appended)


def _check_casing(path: Path, cased: bool, is_cased: bool) -> None:
    if cased and not is_cased:
        raise DataError(f"{path}: `cased` was asked for, but this tokenizer folds case itself; take another one")


def _load_json(path: Path, name: str, data: bytes, cased: bool) -> Tokenizer:
    from tokenizers import Tokenizer as Pipeline

    try:
        pipeline = Pipeline.from_str(data.decode("utf-8"))
    except Exception as error:  # noqa: BLE001 - the library raises plain Exception, nothing narrower
        raise DataError(f"{path}: is not a tokenizer.json ({error}); restore it") from None
    pipeline.no_truncation()
    pipeline.no_padding()
    is_cased = not _folds_case(json.loads(data).get("normalizer"))
    _check_casing(path, cased, is_cased)
    vocab = pipeline.get_vocab(with_added_tokens=True)
    special = _find_special(path, vocab, SPECIAL_NAMES)
    pieces = [""] * (max(vocab.values()) + 1)
    for piece, index in vocab.items():
        pieces[index] = piece
    info = TokenizerInfo("tokenizer.json", name, hashlib.sha256(data).hexdigest(), len(pieces), is_cased, special)
    return JsonTokenizer(info, data, pipeline, pieces)


def _folds_case(normalizer: Any) -> bool:
    """Whether a normalizer of a tokenizer.json, or one inside it, makes lower case."""
    if not isinstance(normalizer, dict):
        return False
    if normalizer.get("type") == "Sequence":
        return any(_folds_case(step) for step in normalizer.get("normalizers", []))
    return normalizer.get("type") == "Lowercase" or bool(normalizer.get("lowercase"))


def train_sentencepiece(lines: Iterator[str], **options: Any) -> bytes:
    """The bytes of a model learnt from `lines` with SentencePiece's `options`; silent, the same in every run.

    Its first pieces are <pad> <unk> [CLS] [SEP] [MASK].

    Raises:
        DataError: SentencePiece refuses the vocabulary size for this text; what `lines` raises passes through.
    """
    from sentencepiece import SentencePieceTrainer

    model, failures = io.BytesIO(), []

    def guarded() -> Iterator[str]:
        # An exception inside the library's iterator would come back as its text in a RuntimeError.
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
            raise DataError(f"SentencePiece cannot learn from this text: {_explain_training(error)}") from None
    if failures:
        raise failures[0]
    return model.getvalue()


def _explain_training(error: RuntimeError) -> str:
    """SentencePiece's message in terms of `--vocab-size`, without source file, line and C++ condition."""
    message = str(error).rpartition("] ")[2]
    if found := re.search(r"size too high \((\d+)\)\D+(\d+)", message):
        return f"vocab size {found[1]} is too large for it; ask for --vocab-size {found[2]} or fewer, or give more text"
    if found := re.search(r"smaller than required_chars\. (\d+) vs (\d+)", message):
        return f"vocab size {found[1]} has no room for its characters; ask for --vocab-size {int(found[2]) + 1} or more"
    return message or "it holds no sentence"
