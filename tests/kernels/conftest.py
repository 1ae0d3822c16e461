"""Runs Triton's kernels: on a GPU if there is one, else in Triton's interpreter, on the CPU."""

from __future__ import annotations

import importlib

import pytest
import torch

try:
    from triton import knobs
except ImportError:
    collect_ignore_glob = ["test_*.py"]
    knobs = None
else:
    # Before any kernel is imported: the decorator of a kernel looks at it. No environment variable, which other tests'
    # processes would inherit.
    knobs.runtime.interpret = not torch.cuda.is_available()
    if knobs.runtime.interpret:
        # Triton's own library (sum, cumsum, philox, ...) was decorated when triton was imported, here or by others.
        for name in ("triton.language.standard", "triton.language.random", "triton.language"):
            importlib.reload(importlib.import_module(name))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
