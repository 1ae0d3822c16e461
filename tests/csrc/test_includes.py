"""Who includes whom in csrc, by the rules of its README."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"
OUTER = ("bindings", "tests")
PRINTING = {"cstdio", "iostream", "print", "stdio.h"}


def includes() -> list[tuple[Path, str, str]]:
    """Of every file: its path in csrc, `"` or `<`, and what it includes."""
    paths = sorted(CSRC.rglob("*.[ch]pp"))
    found = [(path, re.findall(r'^#include (["<])(.+)[">]$', path.read_text(encoding="utf-8"), re.M)) for path in paths]
    return [(path.relative_to(CSRC), kind, name) for path, names in found for kind, name in names]


def test_folders_include_their_own_headers_and_the_shared_ones() -> None:
    wrong = []
    for path, kind, name in includes():
        folder, target = path.parts[0], name.split("/")[0]
        if kind == "<" or (target == "taco" and (CSRC / "include" / name).exists()):
            continue
        if folder in OUTER:
            is_own = "/" not in name and (CSRC / folder / name).exists()
        else:  # a shared header may be made of inner ones
            is_own = folder in (target, "include") and target not in OUTER and (CSRC / name).exists()
        if not is_own:
            wrong.append(f"{path}: {name}")
    assert not wrong


def test_shared_headers_are_those_that_others_need() -> None:
    users = defaultdict(set)
    for path, _, name in includes():
        users[name].add(path.parts[0])
    shared = [f"taco/{path.name}" for path in (CSRC / "include" / "taco").glob("*.hpp")]
    assert [name for name in shared if len(users[name]) < 2 and not users[name] & {*OUTER}] == []


def test_the_library_neither_knows_python_nor_prints() -> None:
    inner = [(path.as_posix(), name) for path, _, name in includes() if path.parts[0] not in OUTER]
    assert [use for use in inner if use[1] in PRINTING or use[1].startswith(("Python.h", "pybind11"))] == []
