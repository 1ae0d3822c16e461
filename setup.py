"""Builds the C++ extension and puts project files into the package; everything else stands in pyproject.toml.

A failed build fails the installation: without the sample indexer nothing trains, and finding out at step 0 of a cluster
job is too late.
"""

from __future__ import annotations

import os
import sys
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))
from pretrain.data.native_build import sources_digest  # noqa: E402  # an isolated build does not look here by itself

# Debug builds for sanitizers: TACO_CXXFLAGS="-O1 -g -fsanitize=address,undefined" python setup.py build_ext --inplace
extra_flags = os.environ.get("TACO_CXXFLAGS", "").split()

native = Pybind11Extension(
    "pretrain.data._native",
    sorted(path for path in glob("csrc/**/*.cpp", recursive=True) if not path.startswith("csrc/tests/")),
    include_dirs=["csrc/include", "csrc"],
    depends=sorted(glob("csrc/**/*.hpp", recursive=True)),
    define_macros=[("TACO_SOURCES", f'"{sources_digest(ROOT / "csrc")}"')],
    cxx_std=17,
    extra_compile_args=["-O3", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", *extra_flags],
    extra_link_args=extra_flags,
)


class BuildPackage(build_py):
    """Puts configs/ and slurm/ into a built package, where `taco init` finds them; a checkout keeps them at its top."""

    def run(self) -> None:
        """Build, without what an earlier build of another version left in the same folder."""
        self._remove_leftovers()
        super().run()
        for target, source in self._project_files().items():
            self.mkpath(str(Path(target).parent))
            self.copy_file(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Every file that is built."""
        return [*super().get_outputs(include_bytecode), *self._project_files()]

    def get_source_files(self) -> list[str]:
        """Every file that the build reads."""
        return [*super().get_source_files(), *self._project_files().values()]

    def _project_files(self) -> dict[str, str]:
        """Built file -> file of the repository; none in an editable installation, which is the checkout."""
        if self.editable_mode:
            return {}
        sources = sorted([*glob("configs/**/*.yaml", recursive=True), *glob("slurm/*.sh")])
        return {str(Path(self.build_lib, "pretrain", "init", "files", source)): source for source in sources}

    def _remove_leftovers(self) -> None:
        outputs = {Path(path) for path in self.get_outputs(include_bytecode=False)}
        for package in ("pretrain", "data_tools"):
            for path in sorted(Path(self.build_lib, package).rglob("*")):
                if path.is_file() and path.suffix != ".so" and path not in outputs:
                    path.unlink()


setup(ext_modules=[native], cmdclass={"build_ext": build_ext, "build_py": BuildPackage})
