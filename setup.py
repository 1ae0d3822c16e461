"""Builds the C++ extension; everything else about the package stands in pyproject.toml.

A failed build fails the installation: without the sample indexer nothing trains, and finding out at step 0 of a cluster
job is too late.
"""

from __future__ import annotations

import os
from glob import glob

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

# Debug builds for sanitizers: TACO_CXXFLAGS="-O1 -g -fsanitize=address,undefined" python setup.py build_ext --inplace
extra_flags = os.environ.get("TACO_CXXFLAGS", "").split()

native = Pybind11Extension(
    "pretrain.data._native",
    sorted(path for path in glob("csrc/**/*.cpp", recursive=True) if not path.startswith("csrc/tests/")),
    include_dirs=["csrc/include"],
    depends=sorted(glob("csrc/**/*.hpp", recursive=True)),
    cxx_std=17,
    extra_compile_args=["-O3", "-Wall", "-Wextra", *extra_flags],
    extra_link_args=extra_flags,
)

setup(ext_modules=[native], cmdclass={"build_ext": build_ext})
