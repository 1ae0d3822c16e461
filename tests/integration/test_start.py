"""What a rank's start loads: torch and DeepSpeed take their time, and nothing that this run does not use is added."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from project import ROOT
from small_runs import write_small_run

# Each costs from a fifth of a second to two seconds at every start of every rank.
UNUSED = ("torch._dynamo", "torch._inductor", "sympy", "megatron", "transformers", "matplotlib", "pandas", "scipy")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_a_run_loads_nothing_that_it_does_not_use(optimizer: str, tmp_path: Path) -> None:
    config = write_small_run(tmp_path, train__steps=2, optim__warmup_steps=0)
    program = (
        "import sys\n"
        "from pretrain.cli import run_program\n"
        "from pretrain.train import app\n"
        "try:\n"
        "    run_program(app, sys.argv[1:])\n"
        "except SystemExit as end:\n"
        f"    print(end.code, [name for name in {UNUSED} if name in sys.modules])\n"
    )
    command = [sys.executable, "-c", program, "--config", str(config), f"optim.name={optimizer}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "0 []", done.stdout + done.stderr
