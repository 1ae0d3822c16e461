"""The lists of packages agree: pyproject.toml, requirements-data.txt, and what the tests ran with, constraints.txt."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from project import ROOT

# Needed by training, export and their checks, by no data program.
TRAINING_ONLY = {"torch", "deepspeed", "megatron-core", "transformers", "safetensors", "tensorboard"}


def by_name(lines: Iterable[str]) -> dict[str, Requirement]:
    """The requirements of a list, without comments, by their normalised name."""
    requirements = [Requirement(text) for line in lines if (text := line.partition("#")[0].strip())]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def dependencies() -> dict[str, Requirement]:
    return by_name(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])


def test_data_work_needs_the_projects_packages_less_those_of_training_in_the_same_ranges() -> None:
    listed = by_name((ROOT / "requirements-data.txt").read_text().splitlines())
    assert listed == {name: entry for name, entry in dependencies().items() if name not in TRAINING_ONLY}
    assert set(dependencies()) > TRAINING_ONLY


def test_the_versions_that_the_tests_ran_with_lie_in_the_ranges() -> None:
    pinned = by_name((ROOT / "constraints.txt").read_text().splitlines())
    for name, requirement in dependencies().items():
        (version,) = (pin.version for pin in pinned[name].specifier)
        assert version in requirement.specifier, requirement
