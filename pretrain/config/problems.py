"""What is wrong with a configuration: collected with its place, and told together, at most a screen of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pretrain.errors import ConfigError

_MOST_SHOWN = 20
_LONGEST = 100


@dataclass(frozen=True, slots=True)
class Place:
    """A line of a file, or an argument of the command line."""

    source: str
    line: int | None = None
    is_argument: bool = False

    def at(self, line: int) -> Place:
        """A line of the same file; an argument is a place of its own."""
        return self if self.is_argument else Place(self.source, line)

    def __str__(self) -> str:
        if self.is_argument:
            return f"command line: {show(self.source)}"
        return self.source if self.line is None else f"{self.source}:{self.line}"


class Problems:
    """Everything that is wrong, in the order in which it was found.

    Only the first ones are put into words: a file may hold half a million unknown keys.

    Attributes:
        count: how many.
        keys: dotted names of the keys whose values are not known because of them.
    """

    def __init__(self) -> None:
        self.count = 0
        self.keys: set[str] = set()
        self._texts: list[str] = []

    def add(self, place: Place, text: str | Callable[[], str], *, key: str | None = None) -> None:
        """Note one problem with the value of `key`; a callable makes the text, if it is shown."""
        self.count += 1
        if key is not None:
            self.keys.add(key)
        if len(self._texts) < _MOST_SHOWN:
            self._texts.append(f"{place}: {text if isinstance(text, str) else text()}")

    def refuse(self, name: str) -> None:
        """Raise a ConfigError that tells all problems of the configuration `name`, if there is one."""
        if self.count == 1:
            raise ConfigError(self._texts[0])
        if self.count:
            lines = [f"{name}: {self.count:,} problems", *(f"  - {text}" for text in self._texts)]
            if self.count > len(self._texts):
                lines.append(f"  ... and {self.count - len(self._texts):,} more")
            raise ConfigError("\n".join(lines))


def show(text: str) -> str:
    """A name for a message: without control characters, and cut if it is long."""
    return text if len(text) <= _LONGEST and text.isprintable() else quote(text)


def quote(text: str) -> str:
    """A value for a message, in quotes, cut if it is long."""
    if len(text) <= _LONGEST:
        return repr(text)
    return f"{text[:_LONGEST]!r}... ({len(text):,} characters)"
