"""The kernels compile for a GPU, also where there is none: the interpreter runs what the compiler may refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from project import ROOT

# Of a thread. A kernel whose sums do not fit into its registers at all spills thousands, and crawls.
MOST_SPILLED = 512


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90], ids=["A100", "H100"])
def test_every_kernel_compiles_for_a_gpu_and_fits_it(capability: int, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(ROOT / "tests/helpers/gpu_compiler.py"), str(capability)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert answer.returncode == 0, answer.stderr[-3000:]
    found = json.loads(answer.stdout.splitlines()[-1])
    programs = found["programs"]
    for name, program in programs.items():
        print(name, program)
    assert missing_kernels(programs, capability) == set()
    assert {name: program for name, program in programs.items() if program["shared"] > found["limit"]} == {}
    assert {name: program for name, program in programs.items() if program["spills"] > MOST_SPILLED} == {}
    # Numbers of tokens differ from step to step. A kernel compiled for another one would stop a step, or a capture.
    assert {name: program for name, program in programs.items() if program["variants"] > 1} == {}
    # A program of one warp that passed data through shared memory would wait for it at every candidate.
    contrast = [program["shared"] for name, program in programs.items() if "_contrast_kernel" in name]
    assert contrast == [0] * len(contrast)


def missing_kernels(programs: dict[str, object], capability: int) -> set[str]:
    """Kernels of the package that no case compiles: functions that Triton compiles and that some launcher launches."""
    launched = set()
    for path in (ROOT / "pretrain/kernels").glob("*.py"):
        text = path.read_text()
        names = [line.split("(")[0][4:] for line in text.splitlines() if line.startswith("def ")]
        launched |= {f"{path.stem}.{name}" for name in names if f" {name}[" in text}
    assert len(launched) > 15
    if capability < 89:
        launched -= {"fp8_cast_triton._cast", "fp8_cast_triton._find_largest"}
    return launched - {name.split(":")[0] for name in programs}
