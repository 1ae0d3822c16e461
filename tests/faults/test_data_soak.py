"""A short run of the soak program: preprocessing that is killed at random makes the same dataset, byte for byte."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "soak" / "soak_preprocess.py"


@pytest.mark.slow
def test_random_faults_leave_no_trace(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), "--seconds", "1", "--megabytes", "20", "--faults", "6", "--json"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    tally = json.loads(result.stdout)
    assert tally["rounds"] >= 1
    assert tally["runs"] > tally["rounds"]
