"""The tokenizer of an export: that of the checkpoint, with the length at which transformers truncates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pretrain.checkpoint.manifest import CheckpointManifest
from pretrain.errors import DataError

_CONFIG = "tokenizer_config.json"
# What classes that build their own normalizer must be told, unless the folder's author did.
_BERT_SETTINGS = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")


def write_tokenizer(
    checkpoint: Path, manifest: CheckpointManifest, folder: Path, trained: int | None, positions: int
) -> int | None:
    """Write the tokenizer of a verified checkpoint into `folder`; returns its `model_max_length`.

    That is `trained`, the trained positions, or at most `positions`, which the model has. Only files that the manifest
    lists are read, no link beside them. None if the checkpoint has no tokenizer.

    Raises:
        DataError: a file is damaged or cannot be written.
    """
    from pretrain.data.tokenizer.folder import MARKER, SOURCE_NAMES
    from pretrain.data.tokenizer.load import load_tokenizer

    names = {Path(record.name).name for record in manifest.files if Path(record.name).parent == Path("tokenizer")}
    if not names:
        return None
    config = _read_config(checkpoint / "tokenizer" / _CONFIG) if _CONFIG in names else {}
    length = positions if trained is None else min(trained, positions)
    given = config.get("model_max_length")
    if trained is None and isinstance(given, int | float) and 0 < given < length:
        length = int(given)
    if MARKER in names and names & set(SOURCE_NAMES.values()):
        # Saved anew, so that a checkpoint of an earlier release has what this one knows of transformers.
        load_tokenizer(checkpoint / "tokenizer").save_pretrained(folder, max_length=length)
        return length
    for name in names:
        shutil.copyfile(checkpoint / "tokenizer" / name, folder / name)
    _complete(folder, config, length)
    return length


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: is no JSON object ({error}); import the model again without this file") from None


def _complete(folder: Path, config: dict[str, Any], length: int) -> None:
    """Write the tokenizer_config.json of a folder that others made, with `length` and what their classes must know."""
    pipeline = folder / "tokenizer.json"
    try:
        settings = _without_limits(pipeline) if pipeline.exists() else {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{pipeline}: is no tokenizer.json ({error!r}); import the model again with another") from None
    for key in _BERT_SETTINGS:
        if key in settings:
            config.setdefault(key, settings[key])
    config.pop("auto_map", None)  # code of the folder's own, which is not exported
    text = json.dumps({**config, "model_max_length": length}, indent=1)
    (folder / _CONFIG).write_text(text + "\n", encoding="utf-8")


def _without_limits(path: Path) -> dict[str, Any]:
    """Take truncation and padding out of a tokenizer.json; returns the settings that repeat what it does."""
    from pretrain.data.tokenizer.saved_pipeline import settings_of

    text = path.read_text(encoding="utf-8")
    fields = json.loads(text)
    if fields.get("truncation") or fields.get("padding"):
        text = json.dumps({**fields, "truncation": None, "padding": None}, ensure_ascii=False)
        path.write_text(text, encoding="utf-8")
    return settings_of(text)
