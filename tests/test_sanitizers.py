"""The C++ library and its tests under sanitizers: no access outside an array, no overflow, no race."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from project import ROOT


def has_runtime(name: str) -> bool:
    """Whether g++ is here and finds its library `name`; without it, it answers with the bare name."""
    if shutil.which("g++") is None:
        return False
    answer = subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout
    return Path(answer.strip()).is_absolute()


@pytest.mark.soak  # five minutes
@pytest.mark.parametrize(("kind", "runtime"), [("address", "libasan.so"), ("thread", "libtsan.so")])
def test_the_library_passes_its_tests_under_sanitizers(tmp_path: Path, kind: str, runtime: str) -> None:
    if not has_runtime(runtime):
        pytest.skip(f"no g++ with {runtime} here")
    environment = {**os.environ, "BUILD": str(tmp_path), "JOBS": "1"}
    command = [str(ROOT / "csrc/tests/sanitize.sh"), kind]
    result = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    programs = sorted(path.name for path in (ROOT / "csrc/tests").glob("*.cpp"))
    assert result.stdout.splitlines() == [f"{kind}: {name}: no finding" for name in programs]


@pytest.mark.slow
def test_a_finding_ends_with_a_report(tmp_path: Path) -> None:
    """A program that reads past its array, built with the flags of the script, must not pass for sound."""
    if not has_runtime("libasan.so"):
        pytest.skip("no g++ with libasan.so here")
    copy = tmp_path / "project" / "csrc"
    shutil.copytree(ROOT / "csrc" / "include", copy / "include")
    (copy / "tests").mkdir()
    shutil.copy2(ROOT / "csrc/tests/sanitize.sh", copy / "tests")
    (copy / "library.cpp").write_text("int taco_nothing() { return 0; }\n")
    (copy / "tests" / "test_bad.cpp").write_text(
        "#include <vector>\nint main(int count, char**) { std::vector<int> v(4); return v.data()[count + 3]; }\n"
    )
    command = [str(copy / "tests/sanitize.sh"), "address"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
