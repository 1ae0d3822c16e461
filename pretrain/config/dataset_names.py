"""The names by which datasets are given: a prefix, or one of its files."""

from __future__ import annotations

import os
from pathlib import Path


def prefix_of(name: str) -> str:
    """The dataset prefix for the name of a prefix or of one of its files, so that `data/*.json` names datasets.

    `x.bin` is the prefix of `x.bin.bin` only if that exists.
    """
    path = Path(name)
    if path.suffix not in (".bin", ".idx", ".json"):
        return name
    is_prefix = any(os.path.exists(f"{name}{suffix}") for suffix in (".bin", ".idx"))
    return name if is_prefix else str(path.with_suffix(""))
