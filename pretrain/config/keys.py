"""Where a dotted name leads in the tree of sections."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from pretrain.config.sections import IS_PATH, RunConfig


def section_at(path: str) -> type[BaseModel] | None:
    """The section with this dotted name, RunConfig for an empty one; None if there is none."""
    section: type[BaseModel] = RunConfig
    for name in path.split(".") if path else []:
        field = section.model_fields.get(name)
        child = section_type(field.annotation) if field else None
        if child is None:
            return None
        section = child
    return section


def is_plain_section(path: str) -> bool:
    """True for a section, or the `deepspeed:` table, that cannot be absent: an empty value leaves it as it is."""
    parent, _, name = path.rpartition(".")
    owner = section_at(parent)
    field = owner.model_fields.get(name) if owner else None
    if field is None:
        return False
    is_table = get_origin(field.annotation) is dict or section_type(field.annotation) is not None
    return is_table and not is_optional(field.annotation)


def section_type(annotation: Any) -> type[BaseModel] | None:
    """The section that a field of this type holds; None for a single value."""
    for candidate in get_args(annotation) if is_optional(annotation) else (annotation,):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def is_optional(annotation: Any) -> bool:
    """Whether a field of this type may hold nothing."""
    return types.NoneType in get_args(annotation)


def all_keys(section: type[BaseModel] = RunConfig, path: str = "") -> list[str]:
    """The dotted names of all keys and sections below `section`, which is at `path`."""
    keys = []
    for name, field in section.model_fields.items():
        key = f"{path}.{name}" if path else name
        child = section_type(field.annotation)
        keys += [key, *(all_keys(child, key) if child else [])]
    return keys


def find_unknown(allowed: Iterable[str], others: Iterable[str] = ()) -> list[str]:
    """What to say of names after --allow-change that are no key; `others` are names that it takes besides.

    They are no error: a run of another release may have keys that this one does not know.
    """
    known = [*all_keys(), *others]
    lines = []
    for name in allowed:
        if name in known or name.startswith("deepspeed."):
            continue
        key, near = name.partition("=")[0], difflib.get_close_matches(name, known, n=1)
        if key in known:
            remedy = f"write --allow-change {key}, without a value"
        elif "," in name:
            remedy = "write --allow-change once for each key"
        else:
            remedy = f"did you mean {near[0]}?" if near else "name keys as the refusal lists them"
        lines.append(f"--allow-change {name}: there is no such key; {remedy}")
    return lines


def path_keys() -> list[str]:
    """The dotted names of the keys that hold paths, or lists of them."""
    keys = []
    for key in all_keys():
        parent, _, name = key.rpartition(".")
        owner = section_at(parent)
        if owner is not None:
            field = owner.model_fields[name]
            keys += [key] if _holds_paths(field.annotation) or IS_PATH in field.metadata else []
    return keys


def _holds_paths(annotation: Any) -> bool:
    return annotation in (Path, IS_PATH) or any(
        _holds_paths(part) for part in (*get_args(annotation), *getattr(annotation, "__metadata__", ()))
    )
