"""Four processes want the same twenty index tables at once: each is built once, and no half file is seen."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from project import ROOT

NUM_ROUNDS = 20
PROGRAM = textwrap.dedent(
    """
    import os, sys, time
    from pathlib import Path
    import numpy as np
    from pretrain.data.index_cache import cached

    folder, num_rounds = Path(sys.argv[1]), int(sys.argv[2])
    for number in range(num_rounds):
        def make():
            (folder / f"built-{number}-by-{os.getpid()}").touch()
            return {"starts": np.arange(number, number + 300_000, dtype=np.uint32)}
        (folder / f"ready-{number}-{os.getpid()}").touch()
        while len(list(folder.glob(f"ready-{number}-*"))) < 4:
            time.sleep(0.0005)
        found = cached("pack", {"content": number}, make, [folder / "index"])
        if not np.array_equal(found["starts"], np.arange(number, number + 300_000)):
            sys.exit(f"wrong table in round {number}")
    """
)


@pytest.mark.fault("index-race")
@pytest.mark.slow
def test_four_processes_build_each_table_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(NUM_ROUNDS)]
    environment = {**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT))}
    racers = [subprocess.Popen(command, env=environment) for _ in range(4)]
    assert [racer.wait(120) for racer in racers] == [0] * 4
    for number in range(NUM_ROUNDS):
        assert len(list(tmp_path.glob(f"built-{number}-by-*"))) == 1
    names = [path.name for path in (tmp_path / "index").iterdir() if not path.name.endswith(".lock")]
    assert len(names) == NUM_ROUNDS
    assert all(name.endswith(".index") for name in names)
