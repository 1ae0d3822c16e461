"""Folders written by Hugging Face's `save_to_disk()`: which arrow files hold the rows, in order."""

from __future__ import annotations

import json
import os
from typing import Any

from pretrain.errors import DataError

_STATE = "state.json"
_SPLITS = "dataset_dict.json"
_INFO = "dataset_info.json"


def is_saved(folder: str) -> bool:
    """Whether `folder` holds a saved dataset, or a saved dictionary of datasets."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in (_STATE, _SPLITS))


def is_description(path: str) -> bool:
    """Whether a file in a saved dataset describes it, and is neither rows nor anything of the user's."""
    return os.path.basename(path) in (_STATE, _SPLITS, _INFO)


def saved_files(folder: str) -> tuple[list[str], list[str]]:
    """The arrow files of a saved dataset in order, and the names of its splits (none if it is not a dictionary).

    Raises:
        DataError: the folder's description is damaged.
    """
    if os.path.isfile(os.path.join(folder, _SPLITS)):
        splits = _names(folder, _SPLITS, lambda tree: tree["splits"])
        return [path for split in splits for path in saved_files(os.path.join(folder, split))[0]], splits
    names = _names(folder, _STATE, lambda tree: [item["filename"] for item in tree["_data_files"]])
    return [os.path.join(folder, name) for name in names], []


def _names(folder: str, name: str, get: Any) -> list[str]:
    path = os.path.join(folder, name)
    try:
        with open(path, encoding="utf-8") as file:
            names = get(json.load(file))
        if not isinstance(names, list) or not all(isinstance(item, str) for item in names):
            raise ValueError("it holds no list of names")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror}; give the folder that save_to_disk() wrote"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error!r}); save the dataset again with save_to_disk()") from None
    if any(os.path.basename(item) != item or item in ("", ".", "..") for item in names):
        raise DataError(f"{path}: names files outside its folder; save the dataset again with save_to_disk()")
    return names
