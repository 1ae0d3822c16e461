"""The clock of the machine jumps: durations are measured by one that cannot."""

from __future__ import annotations

import ast
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_ranks import live_ranks, state_of
from project import ROOT
from small_runs import write_small_run

from pretrain.checkpoint.manifest import list_checkpoints

# Calls that tell the time of day, and where one is right: it is shown to people, or compared with a file's own.
TIMES_OF_DAY = {"time.time", "time.time_ns", "time.localtime", "time.gmtime", "datetime.now", "datetime.utcnow"}
ALLOWED = {
    ("pretrain/checkpoint/__main__.py", "time.time"),  # age of a checkpoint, from the time in its folder
    ("pretrain/checkpoint/run_record.py", "datetime.now"),  # when a run last saved, in run.json
    ("pretrain/run_folder.py", "datetime.now"),  # when the run was started and done, in env.json and done.json
}


def times_of_day(path: Path) -> Iterator[str]:
    """Names of the clocks in `TIMES_OF_DAY` that a module uses."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
            if f"{owner}.{node.attr}" in TIMES_OF_DAY:
                yield f"{owner}.{node.attr}"
        elif isinstance(node, ast.ImportFrom) and node.module == "time":
            yield from (f"time.{name.name}" for name in node.names if f"time.{name.name}" in TIMES_OF_DAY)


@pytest.mark.fault("clock")
def test_no_duration_comes_from_the_time_of_day() -> None:
    modules = sorted(path for folder in ("pretrain", "data_tools") for path in (ROOT / folder).rglob("*.py"))
    assert len(modules) > 100
    found = {(str(path.relative_to(ROOT)), name) for path in modules for name in times_of_day(path)}
    assert found == ALLOWED


def let_the_clock_jump(rank: int) -> None:
    """In a rank: every look at the time of day is an hour before or a day after the last one."""
    start, jumps = time.time(), itertools.cycle((-3600.0, 86400.0))
    moments = itertools.accumulate(jumps, initial=start)
    time.time = lambda: next(moments)
    time.time_ns = lambda: int(1e9 * next(moments))


@pytest.mark.slow
@pytest.mark.fault("clock")
def test_a_jumping_clock_changes_nothing(tmp_path: Path) -> None:
    """No save comes too early or too late, and no bit changes."""
    states, saved = [], []
    for name, before in (("clean", None), ("jumping", let_the_clock_jump)):
        (tmp_path / name).mkdir()
        config = write_small_run(tmp_path / name, run={"output_dir": str(tmp_path / name / "run"), "seed": 7})
        with live_ranks(1, config, "checkpoint.every_minutes=30", before=before) as ranks:
            assert ranks.wait() == [0], ranks.output()
        states.append(state_of(ranks.run, 8))
        saved.append([path.name for path in list_checkpoints(ranks.run / "checkpoints")])
    assert states[0] == states[1]
    assert saved[0] == saved[1]
