"""Text to token ids: WordPiece vocabularies, SentencePiece models and `tokenizer.json` files behind one class.

The start of the flow: preprocessing encodes with it, training takes special ids and word boundaries from it, export
writes it beside the model. Ids are those of the reference library (transformers' BertTokenizerFast, sentencepiece,
tokenizers). These libraries are imported when needed; torch never is.
"""

from __future__ import annotations

import re
from pathlib import Path

from pretrain.data.tokenizer.base import SPECIAL_NAMES, Tokenizer, check_casing
from pretrain.data.tokenizer.folder import read_folder
from pretrain.data.tokenizer.info import TokenizerInfo
from pretrain.data.tokenizer.json_file import load_json
from pretrain.data.tokenizer.sentencepiece_model import SENTENCEPIECE_SPECIAL, load_sentencepiece, train_sentencepiece
from pretrain.data.tokenizer.wordpiece import WORDPIECE_SPECIAL, load_wordpiece, wordpiece_pipeline
from pretrain.errors import DataError

__all__ = [
    "SENTENCEPIECE_SPECIAL",
    "SPECIAL_NAMES",
    "WORDPIECE_SPECIAL",
    "OtherTokenizerError",
    "Tokenizer",
    "find_dataset_tokenizer",
    "load_dataset_tokenizer",
    "load_tokenizer",
    "train_sentencepiece",
    "wordpiece_pipeline",
]


# A name of the Hugging Face hub, such as bert-base-uncased or google/electra-small.
_HUB_NAME = re.compile(r"[\w-]+(?:\.\d[\w-]*)*(?:/[\w-]+(?:\.\d[\w-]*)*)?")


class OtherTokenizerError(DataError):
    """The tokenizer beside a dataset is not the one that made its ids."""


def load_tokenizer(path: str | Path, *, cased: bool = False) -> Tokenizer:
    """The tokenizer in `path`: a WordPiece `vocab.txt`, a SentencePiece `.model`, a `tokenizer.json`, or a folder.

    A folder is one that `save_pretrained` wrote, ours or transformers'. `cased` keeps case and accents with a
    `vocab.txt`; the other kinds define that themselves, and `cased` is an error if they fold case. `info.sha256` is the
    hash of the file's bytes; for a cased `vocab.txt`, of the bytes followed by b"\\0cased", since its ids differ.

    Raises:
        DataError: the file is missing, of an unknown kind, damaged, or lacks what BERT needs.
    """
    source, name = Path(path), Path(path).name
    if source.is_dir():
        source, name, kept_cased = read_folder(source)
        if source.suffix == ".txt" and kept_cased is not None:
            check_casing(source, cased, kept_cased)
            cased = kept_cased
    elif not source.exists() and Path(f"{path}.tokenizer").is_dir():
        raise DataError(f"{path}: no such file or folder; the tokenizer of that dataset is {path}.tokenizer")
    elif _HUB_NAME.fullmatch(str(path)) and not source.exists():
        raise DataError(
            f"{path}: no such file or folder, and names of the hub are not downloaded; where there is a network, "
            f"`hf download {path} --local-dir FOLDER`, then give that folder or its tokenizer.json or vocab.txt"
        )
    data = _read(source)
    if source.suffix == ".model":
        return load_sentencepiece(source, name, data, cased)
    if source.suffix == ".json":
        return load_json(source, name, data, cased)
    if source.suffix == ".txt":
        return load_wordpiece(source, name, data, cased)
    raise DataError(f"{path}: unknown kind of tokenizer; give a vocab.txt, a SentencePiece .model or a tokenizer.json")


def find_dataset_tokenizer(prefix: str | Path, made_by: TokenizerInfo) -> Tokenizer | None:
    """The tokenizer in the folder PREFIX.tokenizer, None if there is no such folder.

    Raises:
        OtherTokenizerError: it is not `made_by`, the one in the manifest, which made the dataset's ids.
        DataError: the folder is damaged.
    """
    folder = Path(f"{prefix}.tokenizer")
    if not folder.is_dir():
        return None
    tokenizer = load_tokenizer(folder)
    if tokenizer.info.sha256 != made_by.sha256:
        raise OtherTokenizerError(
            f"{folder}: holds another tokenizer than the one that made the dataset: expected the tokenizer with sha256 "
            f"{_describe(made_by)}, found {_describe(tokenizer.info)}; restore the folder from where the dataset was "
            "made, or preprocess again"
        )
    return tokenizer


def load_dataset_tokenizer(prefix: str | Path, made_by: TokenizerInfo) -> Tokenizer:
    """Like `find_dataset_tokenizer`, but raises DataError if there is no folder, too."""
    tokenizer = find_dataset_tokenizer(prefix, made_by)
    if tokenizer is None:
        raise DataError(f"{prefix}.tokenizer: is missing; copy it from where the dataset was made, or preprocess again")
    return tokenizer


def _describe(info: TokenizerInfo) -> str:
    return f"{info.sha256} ({info.name}, {info.vocab_size} pieces)"


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: the tokenizer cannot be read: {error.strerror}") from None
    if not data:
        raise DataError(f"{path}: the tokenizer file is empty; restore it or train one (`taco data train-tokenizer`)")
    return data
