"""Runs Triton's kernels: on a GPU if there is one, else in Triton's interpreter, on the CPU."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

try:
    from triton import knobs
except ImportError:

    class Skipped(pytest.File):
        """A file of tests that cannot run here."""

        def collect(self) -> list[pytest.Item]:
            pytest.skip("needs the package triton, which `make test` installs", allow_module_level=True)

    def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.File:
        return Skipped.from_parent(parent, path=module_path)
else:
    # Before any kernel is imported: the decorator of a kernel looks at it. Processes of later tests inherit it, as the
    # variable TRITON_INTERPRET; on a CPU no run takes Triton by itself, so it changes nothing there.
    knobs.runtime.interpret = not torch.cuda.is_available()
    if knobs.runtime.interpret:
        # Triton's own library (sum, cumsum, philox, ...) was decorated when triton was imported, here or by others.
        for name in ("triton.language.standard", "triton.language.random", "triton.language"):
            importlib.reload(importlib.import_module(name))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
