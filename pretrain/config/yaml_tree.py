"""Configuration files as trees of their text: every value as it was written, with its file and line.

What a text means depends on the key that it belongs to (`values.py`). YAML alone would decide too early: YAML 1.1
takes `off` for a boolean, `0100` for 64, `1:30` for 90 and `1e-4` for text. Tags, recursion and second documents are
refused, so a file can neither make objects nor grow when it is read.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml import events

from pretrain.config.problems import Place, Problems, show

NULLS = ("", "~", "null", "Null", "NULL")

_MOST_BYTES = 1 << 26
_DEEPEST = 32
_MOST_COPIED = 100_000  # nodes that aliases may repeat
# YAML would read `[${DATA}/books]` as a list with a table in it: characters for private use stand for these braces.
_BRACED = re.compile(r"(?<=\$)\{(\w+)\}", re.ASCII)
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml where PyYAML was built with it: the same events


@dataclass(frozen=True, slots=True)
class Scalar:
    """A single value; `is_literal`: the text is a path already, with nothing to expand in it."""

    text: str
    place: Place
    is_quoted: bool = False
    is_literal: bool = False

    @property
    def is_null(self) -> bool:
        """True for nothing at all, `~` and `null`, not in quotes."""
        return not self.is_quoted and self.text in NULLS


@dataclass(frozen=True, slots=True)
class Sequence:
    """A list."""

    items: tuple[Node, ...]
    place: Place


@dataclass(frozen=True, slots=True)
class Table:
    """Keys and their values."""

    entries: dict[str, Node]
    place: Place


Node = Scalar | Sequence | Table


class UnreadableError(Exception):
    """A text that is no configuration at all; `str` is the reason, `line` where."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


def read_text(path: Path) -> str:
    """The text of a configuration file.

    Raises:
        UnreadableError: there is no such file, it cannot be read, or it is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        raise UnreadableError(f"no such configuration file; {_suggest_file(path)}") from None
    except IsADirectoryError:
        raise UnreadableError("cannot be read: it is a folder; name a YAML file in it") from None
    except (OSError, ValueError) as error:
        raise UnreadableError(f"cannot be read: {error}") from None
    if len(content) > _MOST_BYTES:
        raise UnreadableError(f"has more than {_MOST_BYTES >> 20} MiB; no configuration is that long")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UnreadableError("cannot be read: it is UTF-16, and must be UTF-8; iconv -f UTF-16 -t UTF-8 converts it")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UnreadableError(
            f"cannot be read: byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8", line
        ) from None


def _suggest_file(path: Path) -> str:
    names = {entry.name: entry for pattern in ("*.yaml", "*.yml") for entry in path.parent.glob(pattern)}
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f"did you mean {show(str(names[near[0]]))}?"
    return "configs/ holds examples" if Path("configs").is_dir() else "`taco init FOLDER` lays out examples"


def parse(text: str, place: Place, problems: Problems) -> Node | None:
    """The tree of a YAML text, None if it is empty; keys that are there twice go to `problems`.

    Raises:
        UnreadableError: it is not valid YAML, or uses what a configuration does not need: tags, several documents, more
            than 32 levels, aliases that multiply it.
    """
    builder = _Builder(place, problems)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UnreadableError("is not valid YAML: it holds bytes that are not UTF-8") from None
    try:
        loader = _LOADER(_BRACED.sub("\ue000\\1\ue001", text))
        while (event := loader.get_event()) is not None:
            builder.take(event)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _explain(text, error.problem or str(error.context), mark.line if mark else 0) from None
    except yaml.YAMLError as error:  # characters that YAML does not allow
        position = getattr(error, "position", 0)
        character = getattr(error, "character", 0)
        code = ord(character) if isinstance(character, str) else character
        raise UnreadableError(
            f"is not valid YAML: the character U+{code:04X} is not allowed", text.count("\n", 0, position) + 1
        ) from None
    return builder.root


def plain_tree(value: Any, place: Place) -> Node:
    """A tree of plain Python values (as JSON or YAML would give) as a tree of texts; nothing in it is expanded."""
    if isinstance(value, Mapping):
        return Table({str(key): plain_tree(entry, place) for key, entry in value.items()}, place)
    if isinstance(value, list | tuple):
        return Sequence(tuple(plain_tree(item, place) for item in value), place)
    if value is None or isinstance(value, bool):
        return Scalar({None: "null", True: "true", False: "false"}[value], place)
    return Scalar(str(value), place, is_quoted=not isinstance(value, int | float), is_literal=True)


@dataclass
class _Frame:
    """A list or a table that has begun; sizes count nodes that came through aliases."""

    is_table: bool
    place: Place
    anchor: str | None
    entries: dict[str, Node] = field(default_factory=dict)
    items: list[Node] = field(default_factory=list)
    merged: list[Node] = field(default_factory=list)
    key: Scalar | None = None
    height: int = 1


class _Builder:
    """Builds the tree from YAML's events, without recursion."""

    def __init__(self, place: Place, problems: Problems) -> None:
        self.root: Node | None = None
        self._place, self._problems = place, problems
        self._frames: list[_Frame] = []
        self._anchors: dict[str, tuple[Node, int, int]] = {}  # node, how many nodes, how many levels
        self._copied = self._num_documents = self._count = 0
        self._starts: list[int] = []

    def take(self, event: Any) -> None:
        """Take the next event of the text."""
        line = event.start_mark.line + 1
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise UnreadableError(
                f"is not valid YAML for a configuration: the tag {show(tag)} is not allowed; write the value "
                "itself, in quotes if it is text",
                line,
            )
        if isinstance(event, events.ScalarEvent):
            self._count += 1
            value = event.value.replace("\ue000", "{").replace("\ue001", "}")
            node = Scalar(value, self._at(line), is_quoted=not event.implicit[0])
            self._add(node, event.anchor, 1, 0)
        elif isinstance(event, events.AliasEvent):
            self._repeat(str(event.anchor), line)
        elif isinstance(event, events.CollectionStartEvent):
            self._begin(event, line)
        elif isinstance(event, events.CollectionEndEvent):
            self._end()
        elif isinstance(event, events.DocumentStartEvent):
            self._num_documents += 1
            if self._num_documents > 1:
                raise UnreadableError("holds a second document, which begins here (---); keep one of them", line)

    def _at(self, line: int) -> Place:
        return self._place.at(line)

    def _begin(self, event: Any, line: int) -> None:
        if len(self._frames) >= _DEEPEST:
            raise UnreadableError(f"is nested more than {_DEEPEST} levels deep", line)
        self._frames.append(_Frame(isinstance(event, events.MappingStartEvent), self._at(line), event.anchor))
        self._starts.append(self._count)
        self._count += 1

    def _end(self) -> None:
        frame = self._frames.pop()
        num_nodes = self._count - self._starts.pop()
        if frame.is_table:
            node: Node = Table(self._merge(frame), frame.place)
        else:
            node = Sequence(tuple(frame.items), frame.place)
        self._add(node, frame.anchor, num_nodes, frame.height)

    def _repeat(self, anchor: str, line: int) -> None:
        if anchor not in self._anchors:
            raise UnreadableError(f"the alias *{show(anchor)} has no anchor that ends before it", line)
        node, num_nodes, height = self._anchors[anchor]
        self._copied += num_nodes
        self._count += num_nodes
        if self._copied > _MOST_COPIED:
            raise UnreadableError(f"its aliases repeat more than {_MOST_COPIED:,} values", line)
        if len(self._frames) + height > _DEEPEST:
            raise UnreadableError(f"is nested more than {_DEEPEST} levels deep", line)
        self._add(node, None, num_nodes, height, place=self._at(line))

    def _add(self, node: Node, anchor: str | None, num_nodes: int, height: int, place: Place | None = None) -> None:
        """Put a complete node where it belongs; `place`: where an alias of it stands."""
        if anchor is not None:
            self._anchors[anchor] = (node, num_nodes, height)
        if not self._frames:
            self.root = node
            return
        frame = self._frames[-1]
        frame.height = max(frame.height, height + 1)
        if not frame.is_table:
            frame.items.append(node)
        elif frame.key is None:
            if not isinstance(node, Scalar):
                raise UnreadableError("is not valid YAML for a configuration: a key must be a name", node.place.line)
            frame.key = Scalar(node.text, place or node.place, node.is_quoted)
        else:
            key, frame.key = frame.key, None
            self._enter(frame, key, node)

    def _enter(self, frame: _Frame, key: Scalar, node: Node) -> None:
        if key.text == "<<" and not key.is_quoted:
            frame.merged += node.items if isinstance(node, Sequence) else (node,)
        elif key.text not in frame.entries:
            frame.entries[key.text] = _moved(node, key.place)
        else:
            first = frame.entries[key.text]
            path = ".".join([*(outer.key.text for outer in self._frames if outer.key is not None), key.text])
            self._problems.add(self._place, lambda: _explain_twice(path, first, node, key.place), key=path)

    def _merge(self, frame: _Frame) -> dict[str, Node]:
        """The entries, with those that `<<` takes from elsewhere and the table does not have itself."""
        entries: dict[str, Node] = {}
        for source in frame.merged:
            if not isinstance(source, Table):
                raise UnreadableError("`<<` takes a table or a list of tables", source.place.line)
            entries = {**source.entries, **entries}
        return {**entries, **frame.entries}


def _moved(node: Node, place: Place) -> Node:
    """The node with the line of its key, which is where people look."""
    if node.place == place:
        return node
    if isinstance(node, Scalar):
        return Scalar(node.text, place, node.is_quoted)
    return Sequence(node.items, place) if isinstance(node, Sequence) else Table(node.entries, place)


def _explain_twice(path: str, first: Node, second: Node, place: Place) -> str:
    one, other = first.place.line, place.line
    where = f"on lines {one} and {other}" if one != other else f"on line {one}"
    values = ""
    if isinstance(first, Scalar) and isinstance(second, Scalar):
        values = f" ({show(first.text)} and {show(second.text)})"
    remedy = "join them" if isinstance(first, Table) else "remove one of them"
    return f"{show(path)}: is there twice, {where}{values}; {remedy}"


def _explain(text: str, problem: str, index: int) -> UnreadableError:
    lines = text.splitlines()
    line = lines[index] if index < len(lines) else ""
    before = lines[index - 1] if 0 < index <= len(lines) else ""
    hint = ""
    indented = [
        candidate for candidate in (line, before) if "\t" in candidate[: len(candidate) - len(candidate.lstrip())]
    ]
    if indented or ("\t" in line and "token" in problem):
        hint = "; indent with spaces, YAML allows no tabs there"
    elif "mapping values are not allowed" in problem:
        hint = "; put text that holds a colon and a space in quotes, and indent keys of one section alike"
    elif "could not find expected ':'" in problem:
        hint = "; write a space after the colon"
    return UnreadableError(f"is not valid YAML: {problem}{hint}", index + 1)
