"""The test programs of csrc/tests, compiled for pytest.

Object files and programs lie in build/csrc-tests. Their names end in a hash of all that they were made of, so what was
compiled once is found again, and nothing is ever out of date. `make clean` removes them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-Icsrc/include", "-Icsrc")
NOT_LIBRARY = ("bindings", "tests")  # folders of csrc: one needs Python, in the other each file is a program


def program_names() -> list[str]:
    """Of all programs in csrc/tests."""
    return sorted(path.stem for path in (ROOT / "csrc" / "tests").glob("*.cpp"))


def build_program(name: str, *flags: str, folder: str = "", root: Path = ROOT) -> Path:
    """csrc/tests/NAME.cpp, compiled and linked with the library; skips the test where there is no compiler.

    Args:
        flags: for the compiler, after those that every program has.
        folder: the only one of csrc that the program needs. Other flags compile all of the library once more.
        root: the folder that holds csrc and gets build.

    Raises:
        AssertionError: it does not compile without a warning; holds what the compiler says.
    """
    library = [path for path in sorted((root / "csrc" / folder).rglob("*.cpp")) if _is_library(path, root)]
    with _locked(root / "build" / "csrc-tests") as target:
        objects = [_compile(path, flags, target, root) for path in (*library, root / "csrc" / "tests" / f"{name}.cpp")]
        program = target / f"{name}-{_hash([_compiler_version(), *flags, *(path.name for path in objects)])}"
        return _make(program, [*FLAGS, *flags, *map(str, objects)], root)


def _compile(source: Path, flags: tuple[str, ...], target: Path, root: Path) -> Path:
    """The object file of a source. It depends on all headers that it might include: the rule is easy to see."""
    headers = sorted((root / "csrc").rglob("*.hpp"))
    texts = [source, *(path for path in headers if _is_library(path, root) or path.parent == source.parent)]
    parts = [str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() for path in texts]
    key = _hash([_compiler_version(), *FLAGS, *flags, *parts])
    return _make(target / f"{source.stem}-{key}.o", [*FLAGS, *flags, "-c", str(source.relative_to(root))], root)


def _make(target: Path, arguments: list[str], root: Path) -> Path:
    if not target.exists():
        part = target.with_name(f"{target.name}.{os.getpid()}")  # what is cut short never has the name
        result = subprocess.run(
            [_compiler(), *arguments, "-o", str(part)], check=False, capture_output=True, text=True, cwd=root
        )
        assert result.returncode == 0, result.stderr
        part.replace(target)
    return target


@contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """Only one process compiles at a time; those that wait find its object files."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield folder


def _is_library(path: Path, root: Path) -> bool:
    return path.relative_to(root / "csrc").parts[0] not in NOT_LIBRARY


def _hash(parts: Iterable[str | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


def _compiler() -> str:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ here")
    return compiler


@cache
def _compiler_version() -> str:
    return subprocess.run([_compiler(), "--version"], check=True, capture_output=True, text=True).stdout
