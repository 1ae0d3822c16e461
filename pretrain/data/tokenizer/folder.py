"""The folder that holds a tokenizer beside a dataset or an exported model, readable by us and by transformers.

`tokenizer.json` and `tokenizer_config.json` are for transformers' AutoTokenizer. The tokenizer's source file is beside
them under a fixed name, and `taco_tokenizer.json` records which file it is and its original name, so that loading the
folder gives the same tokenizer with the same hash.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from pretrain.data.tokenizer.info import TokenizerInfo
from pretrain.durable import FileRecord
from pretrain.errors import DataError

MARKER = "taco_tokenizer.json"
# The source file's name inside a folder, by kind of tokenizer.
SOURCE_NAMES = {"wordpiece": "vocab.txt", "sentencepiece": "sentencepiece.model", "tokenizer.json": "source.json"}


def write_folder(
    folder: Path, info: TokenizerInfo, source: bytes, tokenizer_json: str, settings: Mapping[str, Any]
) -> None:
    """Creates `folder` and writes the files of a tokenizer into it; `settings` go into tokenizer_config.json.

    Raises:
        DataError: a file cannot be written.
    """
    # The class that takes tokenizer.json as it is. Those of BERT, RoBERTa and so on replace parts of it.
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": inputs, **settings}
    marker = {"source": SOURCE_NAMES[info.kind], "name": info.name, "cased": info.cased}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SOURCE_NAMES[info.kind]).write_bytes(source)
        (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        (folder / MARKER).write_text(json.dumps(marker, indent=1), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{error.filename or folder}: cannot be written: {error.strerror}") from None


def read_verified(folder: Path, records: Iterable[FileRecord]) -> dict[str, bytes]:
    """The files of a tokenizer's folder by name; those that `records` describe are what was written.

    Raises:
        DataError: a file is missing, was changed or cannot be read.
    """
    try:
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    except OSError as error:
        raise DataError(f"{error.filename or folder}: cannot be read: {error.strerror or error}") from None
    for record in records:
        content = files.get(record.name)
        if content is None or xxhash.xxh3_128_hexdigest(content) != record.xxh3_128:
            what = "is missing" if content is None else "differs from what was written (xxh3-128)"
            raise DataError(f"{folder / record.name}: {what}; restore the folder from where the dataset was made")
    return files


def read_folder(folder: Path) -> tuple[Path, str, bool | None]:
    """The source file in `folder`, its original name, and whether to load it as cased (None: the folder does not say).

    A folder that others saved has no marker; a vocab.txt in it is read by the `do_lower_case` beside it.

    Raises:
        DataError: the folder holds no tokenizer, or several, or its marker is damaged.
    """
    marker = folder / MARKER
    try:
        if not marker.exists():
            return _find_source(folder), folder.name, _casing_beside(folder)
        fields = json.loads(marker.read_text(encoding="utf-8"))
        source, name, cased = fields["source"], fields["name"], fields["cased"]
    except DataError:  # which is a ValueError
        raise
    except OSError as error:
        raise DataError(f"{marker}: cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{marker}: is damaged ({error!r}); write the folder again") from None
    if source not in SOURCE_NAMES.values() or not isinstance(name, str) or not isinstance(cased, bool):
        raise DataError(f"{marker}: is damaged (source {source!r}, name {name!r}, cased {cased!r}); write it again")
    return folder / source, name, cased


def _find_source(folder: Path) -> Path:
    for name in ("tokenizer.json", "vocab.txt"):
        if (folder / name).exists():
            return folder / name
    models = sorted(folder.glob("*.model"))
    if len(models) == 1:
        return models[0]
    if models:
        raise DataError(f"{folder}: holds {len(models)} SentencePiece models; name one, such as {models[0]}")
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        raise DataError(
            f"{folder}: holds vocab.json and merges.txt, which make no tokenizer without the code of their model; with "
            "transformers, AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OTHER) writes a tokenizer.json"
        )
    raise DataError(
        f"{folder}: holds no tokenizer.json, vocab.txt or SentencePiece .model; is it a tokenizer's folder?"
    )


def _casing_beside(folder: Path) -> bool | None:
    """Whether transformers' tokenizer_config.json says that case is kept; None if it says nothing."""
    try:
        lowers = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("do_lower_case")
    except (OSError, ValueError, AttributeError):
        return None
    return not lowers if isinstance(lowers, bool) else None
