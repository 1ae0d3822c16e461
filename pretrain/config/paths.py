"""`~` and variables in the paths of a configuration, which no shell has expanded.

A shell expands `~` at the beginning of a word, not in `run.output_dir=~/runs`, and nothing in a file.
"""

from __future__ import annotations

import os
import re

_REFERENCE = re.compile(r"\$(?:(?P<dollar>\$)|(?P<name>[A-Za-z_]\w*)|\{(?P<braced>[^}]*)\})", re.ASCII)
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def expand(text: str) -> str:
    """`text` with `~`, `~user`, `$NAME` and `${NAME}` replaced; `$$` stands for a dollar.

    Raises:
        ValueError: a variable is not set or empty, or there is no such user; the message says which.
    """

    def value(match: re.Match[str]) -> str:
        if match["dollar"]:
            return "$"
        name = match["name"] or match["braced"] or ""
        if not _NAME.fullmatch(name):
            raise ValueError(f"{match[0]} is no variable; write ${{NAME}}, or $$ for a dollar")
        found = os.environ.get(name)
        if not found:
            state = "is not set" if found is None else "is empty"
            raise ValueError(f"the variable {name} {state}; export {name}=..., or write $$ for a dollar")
        return found

    home, slash, rest = text.partition("/")
    if home.startswith("~"):
        found = os.path.expanduser(home)
        if found == home:
            raise ValueError(f"there is no home folder for {home}; write the path itself, or ./{home} for such a name")
        return found + slash + _REFERENCE.sub(value, rest)
    return _REFERENCE.sub(value, text)


def escape(path: str) -> str:
    """The text from which `expand` gives `path`."""
    escaped = re.sub(r"\$(?=[A-Za-z_${])", "$$", path)
    return f"./{escaped}" if escaped.startswith("~") else escaped
