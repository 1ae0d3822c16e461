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
    length = positions if trained is None else min(trained, positions)
    if MARKER in names and names & set(SOURCE_NAMES.values()):
        # Saved anew, so that a checkpoint of an earlier release has what this one knows of transformers.
        load_tokenizer(checkpoint / "tokenizer").save_pretrained(folder, max_length=length)
        return length
    for name in names:
        shutil.copyfile(checkpoint / "tokenizer" / name, folder / name)
    return _limit_length(folder, length)


def _limit_length(folder: Path, length: int) -> int:
    """Set `model_max_length` of a folder that others wrote to at most `length`."""
    path, pipeline = folder / _CONFIG, folder / "tokenizer.json"
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        settings = _without_limits(pipeline) if pipeline.exists() else {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder}: the checkpoint's tokenizer is damaged ({error!r}); import it again") from None
    if not isinstance(config, dict):
        raise DataError(f"{path}: expected a JSON object; import the model again without this file")
    given = config.get("model_max_length")
    if isinstance(given, int | float) and 0 < given < length:
        length = int(given)
    for key in _BERT_SETTINGS:
        if key in settings:
            config.setdefault(key, settings[key])
    config.pop("auto_map", None)  # code of the folder's own, which is not exported
    path.write_text(json.dumps({**config, "model_max_length": length}, indent=1) + "\n", encoding="utf-8")
    return length


def _without_limits(path: Path) -> dict[str, Any]:
    """Take truncation and padding out of a tokenizer.json; returns the settings that repeat what it does."""
    from pretrain.data.tokenizer.saved_pipeline import settings_of

    text = path.read_text(encoding="utf-8")
    fields = json.loads(text)
    if fields.get("truncation") or fields.get("padding"):
        text = json.dumps({**fields, "truncation": None, "padding": None}, ensure_ascii=False)
        path.write_text(text, encoding="utf-8")
    return settings_of(text)
