"""What is left out of the inputs, and how it is said: nothing is passed over in silence."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from pretrain.errors import counted

_NAMED = 5


@dataclass
class Aside:
    """Files and folders that a folder or pattern gave and that are not read, by the reason.

    `products`: with what they are. `again`: a folder, and its other name, which is not followed.
    """

    unknown: list[str] = field(default_factory=list)
    products: list[tuple[str, str]] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    special: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    again: list[tuple[str, str]] = field(default_factory=list)

    def notes(self, root: str) -> Iterator[str]:
        """One sentence for each reason; names are relative to the folder `root`."""
        products = [f"{path} ({what})" for path, what in self.products]
        for paths, one, many, rest in (
            (self.unknown, "file", "", " of unknown kind"),
            (products, "file or folder", "files and folders", " not meant as text"),
            (self.hidden, "hidden file or folder", "hidden files and folders", ""),
            (self.special, "pipe, socket or device", "pipes, sockets and devices", ""),
            (self.folders, "folder", "", " that matches; a pattern that ends with /** reads what is in it"),
        ):
            if paths:
                names = first_names([_relative(path, root) for path in paths])
                yield f"left out {counted(len(paths), one, many)}{rest}: {names}"
        if self.again:
            pairs = [f"{again} is {first}" for first, again in self.again]
            yield f"reads a folder once, whatever links lead to it: {first_names(pairs)}"


def first_names(names: Collection[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(list(names)[:_NAMED]) + more


def named_again(names: Sequence[str]) -> str:
    """How often one file is named, and by which other names."""
    others = [name for name in dict.fromkeys(names) if name != names[0]]
    also = f" (also as {first_names(others)})" if others else ""
    return f"{names[0]} is named {len(names)} times{also}"


def _relative(path: str, root: str) -> str:
    return os.path.relpath(path, root or os.curdir)
