"""The kernels compile for a GPU, also where there is none: the interpreter runs what the compiler may refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from project import ROOT


@pytest.mark.slow
def test_every_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(ROOT / "tests/helpers/gpu_compiler.py")]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert answer.returncode == 0, answer.stderr[-3000:]
    shared = json.loads(answer.stdout.splitlines()[-1])
    # A program of one warp that passed data through shared memory would wait for it at every candidate.
    assert [shared[name] for name in shared if name.startswith("contrast of")] == [0, 0]
