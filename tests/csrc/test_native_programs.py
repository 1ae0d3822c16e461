"""The tests of the C++ library: every program of csrc/tests, and how they are built."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import native_programs
import pytest
from native_programs import build_program, program_names


def run(program: Path) -> None:
    """A program prints what it finds wrong, and ends with 1 then."""
    result = subprocess.run([program], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", program_names())
def test_program(name: str) -> None:
    run(build_program(name))


def test_wordpiece_without_sse2() -> None:
    run(build_program("test_wordpiece", "-DTACO_PORTABLE", folder="text"))


# -- how they are built ------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A library of one function, what reads it from Python, and a program that ends with what the function returns."""
    files = {
        "include/taco/answer.hpp": "inline int answer() { return 3; }\n",
        "text/text.cpp": '#include "taco/answer.hpp"\nint text() { return answer(); }\n',
        "bindings/module.cpp": "#error needs Python\n",
        "tests/check.hpp": "int text();\n",
        "tests/test_text.cpp": '#include "check.hpp"\nint main() { return text(); }\n',
    }
    for name, text in files.items():
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What g++ was asked for, by the beginning of the names."""
    names: list[str] = []
    make = subprocess.run

    def note(command: list[str], **options: object) -> object:
        if "-o" in command:
            names.append(Path(command[-1]).name.rpartition("-")[0])
        return make(command, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(native_programs.subprocess, "run", note)
    return names


def test_only_what_changed_is_compiled(project: Path, compiled: list[str]) -> None:
    program = build_program("test_text", root=project)
    assert sorted(compiled) == ["test_text", "test_text", "text"]
    assert subprocess.run([program], check=False).returncode == 3
    assert build_program("test_text", root=project) == program
    assert len(compiled) == 3

    (project / "csrc/tests/check.hpp").write_text("int text();  // the library does not read this\n")
    build_program("test_text", root=project)
    assert compiled[3:] == ["test_text", "test_text"]

    (project / "csrc/include/taco/answer.hpp").write_text("inline int answer() { return 4; }\n")
    assert subprocess.run([build_program("test_text", root=project)], check=False).returncode == 4
    build_program("test_text", "-DOTHER", root=project)
    assert sorted(compiled[5:]) == ["test_text"] * 4 + ["text"] * 2


def test_two_at_once_compile_once(project: Path, compiled: list[str]) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: build_program("test_text", root=project), range(2))
    assert first == second
    assert sorted(compiled) == ["test_text", "test_text", "text"]


def test_a_warning_is_an_error_that_is_not_kept(project: Path) -> None:
    source = project / "csrc/text/text.cpp"
    good = source.read_text()
    source.write_text("int text() { int unused; return 3; }\n")
    for _ in range(2):
        with pytest.raises(AssertionError, match="unused"):
            build_program("test_text", root=project)
    source.write_text(good)
    assert subprocess.run([build_program("test_text", root=project)], check=False).returncode == 3
