"""The tensors of a Hugging Face folder: one file or shards, safetensors or torch's format, read as tensors only.

Looked for in the order of transformers: model.safetensors, its shards, pytorch_model.bin, its shards.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pretrain.errors import DataError
from pretrain.hf_reading.what_it_is import check_is_content, explain_no_weights
from pretrain.model.hf_names import listing

_INDEX = ".index.json"
# Where programs that save more than the weights put them, in order of preference.
_WRAPPING_KEYS = ("state_dict", "model_state_dict", "model", "module", "weights")


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], str]:
    """All tensors of a model's folder on the CPU, by name, and which file or files they are from.

    Raises:
        DataError: there are none, or a file is no such file, damaged, missing, or holds more than tensors.
    """
    for name, read in (("model.safetensors", _read_safetensors), ("pytorch_model.bin", _read_torch)):
        path, index = folder / name, folder / f"{name}{_INDEX}"
        if path.exists() or path.is_symlink():
            return _read(path, read), str(path)
        if index.exists() or index.is_symlink():
            return _read_shards(index, read)
    raise DataError(explain_no_weights(folder))


def _read(path: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    check_is_content(path)
    try:
        return read(path)
    except DataError:
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds Python objects ({found[1]})" if found else "it is no file of torch.save"
        raise DataError(
            f"{path}: cannot be read as tensors: {reason}; nothing but tensors is read, so save the model again with "
            "save_pretrained"
        ) from None
    except Exception as error:  # noqa: BLE001 - reading a damaged file of torch ends in an error of any kind
        reason = str(error).partition("\n")[0].partition(". This is an internal")[0] or type(error).__name__
        raise DataError(
            f"{path}: cannot be read as tensors ({reason}; {path.stat().st_size:,} bytes); was it fetched completely?"
        ) from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    return load_file(path)


def _read_torch(path: Path) -> dict[str, Tensor]:
    """A table of tensors, alone or within what a training program saved; never a pickle that runs code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about unusual pickles; those that it cannot read are errors
        content = torch.load(path, map_location="cpu", weights_only=True)
    for table in (content, *(_value(content, key) for key in _WRAPPING_KEYS)):
        if isinstance(table, dict) and table and all(isinstance(tensor, Tensor) for tensor in table.values()):
            return {str(name): tensor.detach() for name, tensor in table.items()}
    keys = f"a table of {listing([str(key) for key in content])}" if isinstance(content, dict) else _kind(content)
    raise DataError(
        f"{path}: expected a table of tensors by name, found {keys}; save the model again with save_pretrained"
    )


def _value(content: Any, key: str) -> Any:
    return content.get(key) if isinstance(content, dict) else None


def _kind(content: Any) -> str:
    return f"one object of type {type(content).__name__}"


def _read_shards(index: Path, read: Callable[[Path], dict[str, Tensor]]) -> tuple[dict[str, Tensor], str]:
    shards = _read_index(index)
    missing = [name for name in sorted(set(shards.values())) if not (index.parent / name).exists()]
    if missing:
        raise DataError(
            f"{index}: names {len(set(shards.values()))} files, {len(missing)} of which are missing: "
            f"{listing(missing)}; fetch them into the same folder"
        )
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(shards.values())):
        found = _read(index.parent / name, read)
        wanted = [tensor for tensor, shard in shards.items() if shard == name]
        absent = [tensor for tensor in wanted if tensor not in found]
        if absent:
            raise DataError(
                f"{index.parent / name}: lacks {listing(absent)}, which {index.name} says it holds; fetch both again"
            )
        tensors |= {tensor: found[tensor] for tensor in wanted}
    return tensors, f"{index} ({len(set(shards.values()))} files)"


def _read_index(path: Path) -> dict[str, str]:
    """Which shard of the same folder holds each tensor."""
    check_is_content(path)
    try:
        shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be read as an index of shards ({error!r}); fetch it again") from None
    if not isinstance(shards, dict) or not shards:
        raise DataError(f"{path}: expected the file of each tensor under weight_map; fetch it again")
    for name in shards.values():
        if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]", name):
            raise DataError(f"{path}: names a file outside its folder: {name!r}; it must name files beside it")
    return shards
