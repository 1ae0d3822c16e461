"""Reads the configuration of a run from a YAML file and `section.key=value` overrides; reports all mistakes at once.

Imports no torch, like the tree itself (`sections.py`).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pretrain.config.checks import check_config
from pretrain.config.sections import RunConfig
from pretrain.errors import ConfigError


def load_config(path: Path, overrides: Sequence[str] = (), *, world_size: int | None = None) -> RunConfig:
    """The configuration in `path` with `section.key=value` overrides applied, checked for `world_size` if given.

    A top-level key `extends: other.yaml` (relative to the file) names a file whose values this one changes; a list
    names several, and later files win.

    Raises:
        ConfigError: with file, key, value and remedy of every problem.
    """
    return resolve_config(path, _read_tree(path, seen=()), overrides, world_size=world_size)


def resolve_config(
    path: Path, tree: dict[str, Any], overrides: Sequence[str] = (), *, world_size: int | None = None
) -> RunConfig:
    """The configuration in a nested dictionary, as in `load_config`; errors call the dictionary `path`."""
    for override in overrides:
        _apply_override(tree, override)
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(path, error)) from None
    problems = check_config(config, world_size)
    if problems:
        raise ConfigError(_join(path, problems))
    return config


def dump_config(config: RunConfig) -> str:
    """The resolved tree as YAML; `load_config` reads the same tree from it."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_tree(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `extends` forms a circle: {' -> '.join(str(p) for p in seen)}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file; configs/ holds examples") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections (run:, data:, ...) at the top level, found {type(tree).__name__}")
    bases = tree.pop("extends", [])
    if isinstance(bases, str):
        bases = [bases]
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: extends must be a file name or a list of them, found {bases!r}")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = _merge(merged, _read_tree(path.parent / base, (*seen, path.resolve())))
    return _merge(merged, tree)


def _merge(base: dict[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        both_tables = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both_tables else value
    return merged


def _apply_override(tree: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r}: expected section.key=value, for example optim.lr=1e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from None
    table = tree
    for key in keys[:-1]:
        child = table.get(key)
        # A fresh dict each time: the tree may share tables with the file it extends.
        table[key] = dict(child) if isinstance(child, dict) else {}
        table = table[key]
    table[keys[-1]] = value


# -- explaining --------------------------------------------------------------------------------------------------------


def _join(path: Path, problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return f"{path}: {problems[0]}"
    return f"{path}: {len(problems)} problems\n" + "\n".join(f"  - {problem}" for problem in problems)


def _explain(path: Path, error: ValidationError) -> str:
    return _join(
        path, [_explain_one(detail["loc"], detail["type"], detail["msg"], detail["input"]) for detail in error.errors()]
    )


def _explain_one(loc: tuple[int | str, ...], error_type: str, message: str, value: object) -> str:
    key = ".".join(str(part) for part in loc)
    if error_type == "extra_forbidden":
        return f"{key}: unknown key{_did_you_mean(loc)}"
    if error_type == "missing":
        return f"{key}: is required; set it in the file or as {key}=VALUE"
    if error_type == "tuple_type":
        return f"{key}: expected a list, found {value!r}; write {key}=[{value}]"
    return f"{key}: {message[0].lower() + message[1:]}, found {value!r}"


def _did_you_mean(loc: tuple[int | str, ...]) -> str:
    """A hint for an unknown key: a similar name in its section, or the section that has it."""
    section: type[BaseModel] = RunConfig
    for part in loc[:-1]:
        section = _section_type(section, str(part))
    name = str(loc[-1])
    near = difflib.get_close_matches(name, section.model_fields, n=1)
    if near:
        return f"; did you mean {'.'.join([*map(str, loc[:-1]), near[0]])}?"
    name_by_path = {
        f"{section_name}.{key}": key
        for section_name in RunConfig.model_fields
        if (section_type := _section_type(RunConfig, section_name)) is not RunConfig
        for key in section_type.model_fields
    }
    paths = [path for path, key in name_by_path.items() if key == name]
    if paths:
        return f"; did you mean {paths[0]}?"
    return f"; known keys here: {', '.join(section.model_fields)}"


def _section_type(parent: type[BaseModel], name: str) -> type[BaseModel]:
    field = parent.model_fields.get(name)
    annotation = field.annotation if field else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else parent
