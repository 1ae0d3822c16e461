"""Tests that need a GPU: `make gpu`, which tells DeepSpeed so before it is imported."""

from __future__ import annotations

import os

# Counting GPUs must not start CUDA in the process that forks the ranks.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import pytest
import torch


def _why_not() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no GPU here"
    if os.environ["DS_ACCELERATOR"] != "cuda":
        return "DeepSpeed was told to use the CPU; run these tests with `make gpu`"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _why_not()
    for item in items:
        if "gpu" in item.path.parent.parts:
            item.add_marker(pytest.mark.gpu)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
