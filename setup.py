"""Builds the C++ extension; everything else about the package stands in pyproject.toml.

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
    extra_compile_args=["-O3", "-Wall", "-Wextra", *extra_flags],
    extra_link_args=extra_flags,
)

setup(ext_modules=[native], cmdclass={"build_ext": build_ext})
