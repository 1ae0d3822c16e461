"""Reads the configuration of a run from a YAML file and `section.key=value` overrides; reports all mistakes at once.

Imports no torch, like the tree itself (`sections.py`). Files and overrides become one tree of texts (`yaml_tree.py`),
its texts become values (`convert.py`), and what no single key can know is checked last (`checks.py`).
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pretrain.config.checks import check_config
from pretrain.config.convert import convert_tree
from pretrain.config.keys import is_plain_section, path_keys, section_at
from pretrain.config.paths import escape, expand
from pretrain.config.problems import Place, Problems, quote, show
from pretrain.config.sections import RunConfig
from pretrain.config.values import example
from pretrain.config.yaml_tree import Node, Scalar, Table, UnreadableError, parse, plain_tree, read_text
from pretrain.config.yaml_tree import Sequence as Items

# Required keys, so that contradictions between others are found where these are missing.
_PLACEHOLDERS: dict[str, dict[str, Any]] = {"run": {"output_dir": "."}, "data": {"train": ["."]}}
_RELATIVE = "a relative name starts at the folder of the file that holds it"
_MOST_PROBLEMS = 1000  # with more than these, contradictions are not looked for


def load_config(path: Path, overrides: Sequence[str] = (), *, world_size: int | None = None) -> RunConfig:
    """The configuration in `path` with `section.key=value` overrides applied, checked for `world_size` if given.

    A top-level key `extends: other.yaml` (relative to the file) names a file whose values this one changes; a list
    names several, and later files win. A table changes the keys that it names, in a file and in an override alike.
    `~` and variables in paths are expanded (`paths.py`).

    Raises:
        ConfigError: with file and line or argument, key, value and remedy of every problem.
    """
    problems = Problems()
    try:
        tree = _read_tree(_find(path), (), problems)
    except _UnreadableFileError as error:
        problems.add(error.place, str(error))
        _apply(Table({}, Place(str(path))), overrides, problems)
        problems.refuse(str(path))
        raise AssertionError from None  # `refuse` has raised
    return _resolve(path, tree, overrides, world_size, problems)


def resolve_config(
    path: Path, tree: dict[str, Any], overrides: Sequence[str] = (), *, world_size: int | None = None
) -> RunConfig:
    """The configuration in a nested dictionary, as in `load_config`; errors call the dictionary `path`.

    Paths in the dictionary are taken as they are.
    """
    node = plain_tree(tree, Place(str(path)))
    assert isinstance(node, Table)
    return _resolve(path, node, overrides, world_size, Problems())


def dump_tree(config: RunConfig) -> dict[str, Any]:
    """The resolved tree in plain JSON types, as a file would hold it: with dollars in paths escaped."""
    tree: dict[str, Any] = config.model_dump(mode="json")
    for key in path_keys():
        *sections, name = key.split(".")
        section = reduce(getitem, sections, tree)
        value = section[name]
        if value is not None:
            section[name] = escape(value) if isinstance(value, str) else [escape(item) for item in value]
    return tree


def dump_config(config: RunConfig) -> str:
    """The resolved tree as YAML; `load_config` reads the same tree from it."""
    return yaml.safe_dump(dump_tree(config), sort_keys=False)


def find_repeated(overrides: Sequence[str]) -> list[str]:
    """A line for each key that several overrides set; the last of them counts."""
    keys = [override.partition("=")[0].strip() for override in overrides]
    last = dict(zip(keys, overrides, strict=True))
    return [
        f"{show(key)} is given {count} times on the command line; the last one counts: {show(last[key])}"
        for key, count in Counter(keys).items()
        if count > 1
    ]


# -- from files and arguments to one tree ------------------------------------------------------------------------------


class _UnreadableFileError(Exception):
    """A file that cannot be read as a configuration, and where it is wrong."""

    def __init__(self, place: Place, reason: str) -> None:
        super().__init__(reason)
        self.place = place


def _find(path: Path) -> Path:
    """The file that an argument names; a shell leaves the `~` of `--config=~/run.yaml` as it is."""
    if os.path.exists(path):  # where a pathlib method would raise for a name that is too long
        return path
    try:
        return Path(expand(str(path)))
    except ValueError as error:
        raise _UnreadableFileError(Place(str(path)), str(error)) from None


def _read_tree(path: Path, seen: tuple[Path, ...], problems: Problems) -> Table:
    place = Place(str(path))
    real = Path(os.path.realpath(path))
    if real in seen:
        raise _UnreadableFileError(place, f"`extends` forms a circle: {' -> '.join(str(p) for p in seen)}")
    try:
        tree = parse(read_text(path), place, problems)
    except UnreadableError as error:
        raise _UnreadableFileError(place if error.line is None else place.at(error.line), str(error)) from None
    if tree is None or (isinstance(tree, Scalar) and tree.is_null):
        tree = Table({}, place)
    if not isinstance(tree, Table):
        kind = "a list" if isinstance(tree, Items) else quote(tree.text)
        raise _UnreadableFileError(place, f"expected sections (run:, data:, ...) at the top level, found {kind}")
    own = Table({name: node for name, node in tree.entries.items() if name != "extends"}, place)
    merged = Table({}, place)
    for base, where in _bases(tree.entries.get("extends")):
        try:
            other = path.parent / expand(base)
        except ValueError as error:
            raise _UnreadableFileError(where, f"extends: {error}") from None
        if not os.path.exists(other):
            raise _UnreadableFileError(where, f"extends: {show(str(other))}: no such file; {_RELATIVE}")
        merged = _merge(merged, _read_tree(other, (*seen, real), problems))
    return _merge(merged, own)


def _bases(node: Node | None) -> list[tuple[str, Place]]:
    """What `extends` names, with the place of each name."""
    if node is None or (isinstance(node, Scalar) and node.is_null):
        return []
    items = node.items if isinstance(node, Items) else (node,)
    names = [(item.text, item.place) for item in items if isinstance(item, Scalar) and item.text]
    if len(names) < len(items):
        raise _UnreadableFileError(node.place, "extends must be a file name or a list of them")
    return names


def _merge(base: Table, change: Table, path: str = "") -> Table:
    """`base` with the keys that `change` names; an empty section names none."""
    entries = dict(base.entries)
    for name, node in change.entries.items():
        key, old = f"{path}{name}", entries.get(name)
        if isinstance(node, Table) and isinstance(old, Table):
            entries[name] = _merge(old, node, f"{key}.")
        elif old is None or not (isinstance(node, Scalar) and node.text == "" and is_plain_section(key)):
            entries[name] = node
    return Table(entries, change.place)


def _apply(tree: Table, overrides: Sequence[str], problems: Problems) -> Table:
    """The tree with all overrides that can be read; the last one of a key wins."""
    for override in overrides:
        place = Place(override, is_argument=True)
        name, equals, text = override.partition("=")
        keys = name.strip().split(".")
        if not equals or not all(keys) or any(re.search(r"\s", key) for key in keys):
            hint = "; further files are named by `extends:` in a file" if name.endswith((".yaml", ".yml")) else ""
            problems.add(place, f"expected section.key=value, for example optim.lr=1e-4{hint}")
            continue
        try:
            node = _read_value(text, place, problems)
        except UnreadableError as error:
            problems.add(place, f"the value {error}", key=name.strip())
            continue
        for key in reversed(keys):
            node = Table({key: node}, place)
        assert isinstance(node, Table)
        tree = _merge(tree, node)
    return tree


def _read_value(text: str, place: Place, problems: Problems) -> Node:
    """The value of an override: a list, a table or quoted text in YAML; anything else is the text itself.

    So `#` begins no comment, and no character of a path needs quotes other than the shell's.
    """
    value = text.strip()
    if not value.startswith(("[", "{", '"', "'", "!")):
        return Scalar(value, place)
    return parse(value, place, problems) or Scalar("", place)


# -- from the tree to the configuration --------------------------------------------------------------------------------


def _resolve(
    path: Path, tree: Table, overrides: Sequence[str], world_size: int | None, problems: Problems
) -> RunConfig:
    tree = _apply(tree, overrides, problems)
    values = {**{section: {} for section in _PLACEHOLDERS}, **convert_tree(tree, problems)}
    config = _validate(path, tree, values, problems)
    for text in check_config(config, world_size) if problems.count < _MOST_PROBLEMS else ():
        if not any(_mentions(text, key) for key in problems.keys):
            problems.add(_origin(path, text, overrides), text)
    problems.refuse(str(path))
    return config


def _validate(path: Path, tree: Table, values: dict[str, Any], problems: Problems) -> RunConfig:
    """The configuration; with problems, the one that has defaults in place of all that is wrong."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        details = error.errors(include_url=False)
    for detail in details:
        loc = tuple(str(part) for part in detail["loc"] if isinstance(part, str))
        key = ".".join(loc)
        node = _node_at(tree, loc)
        if detail["type"] == "too_short":
            problems.add(node.place if node else Place(str(path)), f"{key}: is empty; write {example(key)}", key=key)
        elif detail["type"] != "missing":
            found = quote(node.text) if isinstance(node, Scalar) else repr(detail["input"])
            message = detail["msg"][0].lower() + detail["msg"][1:]
            problems.add(node.place if node else Place(str(path)), f"{key}: {message}, found {found}", key=key)
        elif key not in problems.keys:
            problems.add(Place(str(path)), f"{key}: is required; set it in the file or as {example(key)}", key=key)
        _remove(values, loc)
    for section, required in _PLACEHOLDERS.items():
        values[section] = {**required, **values.get(section, {})}
    return RunConfig.model_validate(values)


def _remove(values: dict[str, Any], loc: Sequence[str]) -> None:
    """Remove a key, with a section that cannot be without it."""
    for name in loc[:-1]:
        if not isinstance(values.get(name), dict) or name == "splits":
            break
        values = values[name]
    else:
        values.pop(loc[-1], None)
        return
    values.pop(name, None)


def _node_at(tree: Table, loc: Sequence[str]) -> Node | None:
    node: Node = tree
    for name in loc:
        if not isinstance(node, Table) or name not in node.entries:
            break
        node = node.entries[name]
    return node


def _mentions(text: str, key: str) -> bool:
    """Whether a message is about a key, or about one in the section of this name."""
    end = r"(?![\w])" if section_at(key) is None else r"\b"
    return re.search(rf"(?<![\w.]){re.escape(key)}{end}", text) is not None


def _origin(path: Path, text: str, overrides: Sequence[str]) -> Place:
    """Where a contradiction comes from: the file, with the overrides that it is about."""
    about = [
        override for override in overrides if "=" in override and _mentions(text, override.partition("=")[0].strip())
    ]
    return Place(" with ".join([str(path), *([" ".join(show(override) for override in about[-3:])] if about else [])]))
