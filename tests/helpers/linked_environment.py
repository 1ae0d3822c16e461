"""Virtual environments with the project's wheel and with only those packages of this one that a list asks for.

The packages are links, so an environment costs seconds and no network, and what is not in it cannot be imported there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from project import ROOT

# What a wheel is built from.
_SOURCES = ("pretrain", "data_tools", "csrc", "configs", "slurm", "setup.py", "pyproject.toml", "README.md", "LICENSE")
_IMPORTABLE = """import importlib.util, sys
print(*filter(importlib.util.find_spec, sys.argv[1:]))"""


@dataclass(frozen=True)
class Environment:
    """A virtual environment; its programs see nothing of the repository."""

    folder: Path

    def run(self, *words: object, cwd: Path) -> str:
        """What a command prints in `cwd` when the environment is active; it has to succeed."""
        ended = self.try_run(*words, cwd=cwd)
        assert ended.returncode == 0, f"{words}: {ended.stdout}\n{ended.stderr}"
        return ended.stdout

    def try_run(self, *words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
        """A command in `cwd` when the environment is active, however it ends."""
        variables = {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": str(self.folder)}
        command = [str(word) for word in words]
        return subprocess.run(
            command, cwd=cwd, env={**_variables(), **variables}, capture_output=True, text=True, timeout=200
        )

    def importable(self, *modules: str) -> list[str]:
        """Which of the modules there are."""
        return self.run("python", "-c", _IMPORTABLE, *modules, cwd=self.folder).split()


def build_wheel(folder: Path) -> Path:
    """The project's wheel, built in `folder` from a copy of the sources.

    The extension in use goes into it as it is, because compiling it again takes a minute.
    """
    sources, wheels = folder / "sources", folder / "wheels"
    sources.mkdir(parents=True)
    for name in _SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy2(ROOT / name, sources / name)
    (extension,) = (ROOT / "pretrain" / "data").glob(f"_native{sysconfig.get_config_var('EXT_SUFFIX')}")
    built = sources / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "pretrain" / "data"
    built.mkdir(parents=True)
    shutil.copyfile(extension, built / extension.name)  # newer than its sources, so it is not built again
    _run_pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", f"--wheel-dir={wheels}", str(sources))
    (wheel,) = wheels.glob("*.whl")
    return wheel


def make_environment(folder: Path, wheel: Path, requirements: Iterable[str]) -> Environment:
    """An environment in `folder` that holds the wheel, and the packages that meet `requirements` as links."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    environment = Environment(folder)
    site_packages = environment.run(
        "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
    )
    for distribution in _with_dependencies(requirements):
        _link(distribution, Path(site_packages.strip()))
    _run_pip("--python", str(folder / "bin" / "python"), "install", "--no-deps", "--no-index", str(wheel))
    return environment


def _with_dependencies(requirements: Iterable[str]) -> list[metadata.Distribution]:
    """The installed distributions that meet the requirements, and those that these need in turn."""
    todo = _needed_here(requirements, extras=())
    distributions: dict[str, metadata.Distribution] = {}
    done = set()
    while todo:
        requirement = todo.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in done:
            continue
        done.add((name, extras))
        distribution = metadata.distribution(name)
        assert distribution.version in requirement.specifier, f"{requirement}: {distribution.version} is installed"
        distributions[name] = distribution
        todo += _needed_here(distribution.requires or (), extras)
    return list(distributions.values())


def _needed_here(requirements: Iterable[str], extras: Iterable[str]) -> list[Requirement]:
    """The requirements whose conditions this interpreter, or one of the extras, meets."""
    entries = [Requirement(text) for text in requirements]
    settings = [{"extra": extra} for extra in ("", *extras)]
    return [entry for entry in entries if entry.marker is None or any(map(entry.marker.evaluate, settings))]


def _link(distribution: metadata.Distribution, site_packages: Path) -> None:
    """Links to the modules and the metadata of a distribution."""
    for name in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
        link = site_packages / name
        if not link.is_symlink():  # a namespace that several distributions share
            link.symlink_to(str(distribution.locate_file(name)))


def _run_pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", *words]
    ended = subprocess.run(command, env=_variables(), capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, f"pip {' '.join(words)}: {ended.stdout}\n{ended.stderr}"


def _variables() -> dict[str, str]:
    """The environment variables, without those that would let the repository in."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
