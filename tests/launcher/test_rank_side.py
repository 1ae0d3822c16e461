"""A rank and the launcher that has started it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.errors import LAUNCH_FOLDER, reason_file
from pretrain.launcher.rank_side import LAUNCHER_PROCESS

RANK = "from pretrain.launcher.rank_side import join_launcher; join_launcher(); {}"


def run_rank(folder: Path, work: str, launcher: int) -> subprocess.CompletedProcess[str]:
    variables = {LAUNCH_FOLDER: str(folder), LAUNCHER_PROCESS: str(launcher), "RANK": "3"}
    return subprocess.run(
        [sys.executable, "-c", RANK.format(work)],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_traceback_goes_to_the_launcher(tmp_path: Path) -> None:
    ended = run_rank(tmp_path, "1 / 0", os.getpid())
    assert (ended.returncode, ended.stderr) == (1, "")
    reason = json.loads(reason_file(tmp_path, 3).read_text())
    assert reason["text"].startswith("Traceback")
    assert reason["text"].endswith("ZeroDivisionError: division by zero")
    assert reason["is_consequence"] is False


@pytest.mark.parametrize("missing", [True, False])
def test_a_reason_that_cannot_be_left_is_printed(tmp_path: Path, missing: bool) -> None:
    folder = tmp_path / "absent" if missing else tmp_path
    work = "raise NotImplementedError('x')"
    ended = run_rank(folder, work, os.getpid())
    assert ("NotImplementedError: x" in ended.stderr) is missing


def test_a_rank_whose_launcher_is_gone_does_not_begin(tmp_path: Path) -> None:
    ended = run_rank(tmp_path, "print('began')", launcher=1 << 22)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert f"process {1 << 22}, has ended" in ended.stderr
