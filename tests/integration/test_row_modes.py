"""Whole runs on packed and sentence rows, on a split and a blend: they train and validate, and refuse other weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from project import ROOT
from small_runs import write_small_run

pytestmark = pytest.mark.slow


def train(path: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pretrain.train", "--config", str(path), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240)


@pytest.mark.parametrize("mode", ["pack", "sentence"])
def test_a_run_on_a_blend_of_splits(tmp_path: Path, mode: str) -> None:
    prefixes = [str(tmp_path / name) for name in ("train", "validation")]
    path = write_small_run(
        tmp_path,
        data__train=prefixes,
        data__validation=[],
        data__weights=[3, 1],
        data__splits={"train": 0.8, "validation": 0.2},
        data__row_mode=mode,
        train__steps=3,
    )
    done = train(path)
    assert done.returncode == 0, done.stderr
    assert f"{prefixes[1]}: 25.0000% of the samples" in done.stdout + done.stderr
    assert "masked-token accuracy" in done.stdout + done.stderr
    assert all(list(Path(f"{prefix}.index").glob(f"{mode}-*.index")) for prefix in prefixes)
    refused = train(path, "data.weights=[1,1]")
    assert refused.returncode == 2
    assert "data.weights: [3.0, 1.0] -> [1.0, 1.0]" in refused.stderr
