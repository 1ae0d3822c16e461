"""The tokenizer of a Hugging Face folder: as a file that says all, or as a bare vocabulary of the first releases."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pretrain.data.tokenizer.base import Tokenizer
from pretrain.data.tokenizer.folder import MARKER, SOURCE_NAMES
from pretrain.data.tokenizer.load import load_tokenizer
from pretrain.errors import DataError
from pretrain.hf_reading.what_it_is import check_is_content

_WHOLE = (MARKER, "tokenizer.json")
_SETTINGS = "tokenizer_config.json"
_KEPT = (
    "tokenizer.json",
    _SETTINGS,
    "special_tokens_map.json",
    "vocab.txt",
    "spiece.model",
    "added_tokens.json",
    MARKER,
    *SOURCE_NAMES.values(),
)


def load_folder_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a model's folder, None if it holds none.

    A bare vocab.txt folds case unless tokenizer_config.json says `do_lower_case: false`, as in transformers.

    Raises:
        DataError: a file of it is damaged, or stands for another one.
    """
    candidates = [folder / name for name in (*_WHOLE, "vocab.txt")] + sorted(folder.glob("*.model"))
    found = [path for path in candidates if path.exists() or path.is_symlink()]
    for path in [*found, *sorted(folder.glob(_SETTINGS))]:
        check_is_content(path)
    if not found:
        return None
    tokenizer = load_tokenizer(folder)
    if (added := max(_added_ids(folder), default=0)) >= tokenizer.vocab_size:
        raise DataError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size:,} pieces, and an added one with id {added:,} is in "
            "another file; write one tokenizer.json with AutoTokenizer.from_pretrained and save_pretrained"
        )
    return tokenizer


def copy_tokenizer(source: Path | None, tokenizer: Tokenizer, target: Path, *, max_length: int) -> None:
    """Write `tokenizer` into the new folder `target`, such that transformers and `load_tokenizer` both load it.

    If it is from the model's folder `source`, and whole there, the files are copied as they are.

    Raises:
        OSError: the disk refuses.
        DataError: a file cannot be written, or the vocabulary cannot be converted for transformers.
    """
    if source is None or not _is_whole(source):
        tokenizer.save_pretrained(target, max_length=max_length)
        return
    target.mkdir(parents=True)
    for name in dict.fromkeys(_KEPT):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _added_ids(folder: Path) -> list[int]:
    """Ids of the pieces that transformers adds to a vocabulary from other files of the folder."""
    added = _read_table(folder / "added_tokens.json").values()
    settings = _read_table(folder / _SETTINGS).get("added_tokens_decoder")
    ids = [*added, *(settings if isinstance(settings, dict) else ())]
    return [int(index) for index in ids if str(index).isdecimal()]


def _is_whole(folder: Path) -> bool:
    return any((folder / name).exists() for name in _WHOLE)


def _read_table(path: Path) -> dict[str, Any]:
    """The JSON object in a file, an empty one if there is no file."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: cannot be read ({error!r}); fetch it again or remove it") from None
