"""Who is called the culprit, how long silence may last, and which ranks count as slow; tests/faults/ has real hangs."""

from __future__ import annotations

import math
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.checks import check_config
from pretrain.config.sections import RunConfig, WatchdogSection
from pretrain.metrics import MetricsLog, read_metrics
from pretrain.resilience.hang_verdict import describe_hang
from pretrain.resilience.heartbeat import Heartbeat, Sign, SignFolder
from pretrain.resilience.stragglers import Stragglers
from pretrain.resilience.watchdog import silence_limit


def sign(rank: int, count: int = 2, **changes: Any) -> Sign:
    usual = {"host": f"node{rank}", "process": 100 + rank, "kind": "step", "stage": "losses", "step": 17, "ticks": 50}
    return Sign(start="s", rank=rank, count=count, **usual | {"silent_seconds": 40.0} | changes)


def verdict(*now: Sign, world_size: int | None = None) -> str:
    before = {one.rank: sign(one.rank, count=1) for one in now}
    return describe_hang(before, {one.rank: one for one in now}, world_size or len(now))


def test_the_rank_in_an_earlier_stage_or_step_is_behind() -> None:
    place = "pretrain/data/batches.py:200 (prefetch)"
    found = verdict(sign(0), sign(1), sign(2, stage="data", ticks=47, silent_seconds=41.2, place=place))
    assert found == (
        "hang in step 17: rank 2 on node2 (process 102) is behind: in data of step 17 for 41 s, at "
        "pretrain/data/batches.py:200 (prefetch); 2 ranks wait in losses of step 17"
    )
    assert "rank 0 on node0 (process 100) is behind: in backward of step 16" in verdict(
        sign(0, step=16, stage="backward", ticks=44), sign(1)
    )


def test_of_ranks_in_the_same_stage_the_one_outside_the_collective_is_named() -> None:
    found = verdict(sign(0, is_waiting=True), sign(1), sign(2, is_waiting=True))
    assert "rank 1 on node1 (process 101) does not join the others" in found
    assert "2 ranks wait in losses" in found


def test_a_process_without_new_signs_does_not_run() -> None:
    found = verdict(sign(0), sign(1, count=1, step=15, stage="forward"), world_size=3)
    assert "rank 1 on node1 (process 101) does not run (stopped, killed, or its node is away)" in found
    assert "last heard of in forward of step 15" in found
    assert "rank 2 has given no sign of life in this start" in found
    assert "1 rank waits in losses of step 17" in found


def test_ranks_that_all_wait_in_the_same_place_blame_the_network() -> None:
    found = verdict(*(sign(rank, is_waiting=True) for rank in range(4)))
    assert "no rank is behind, for 40 s: look at the network" in found
    assert "4 ranks wait in losses of step 17" in found


def test_many_culprits_are_counted() -> None:
    found = verdict(sign(0), *(sign(rank, stage="data", ticks=47) for rank in range(1, 9)))
    assert "rank 4 on node4" in found
    assert "rank 5 on node5" not in found
    assert "and 4 more ranks" in found


def test_time_outs_grow_with_what_the_run_takes_but_stay_below_the_last_line() -> None:
    section = WatchdogSection(step_seconds=60, checkpoint_seconds=None, factor=10, collective_seconds=1000)
    assert silence_limit(section, "step", slowest=2.0) == 60
    assert silence_limit(section, "step", slowest=20.0) == 200
    assert silence_limit(section, "step", slowest=500.0) == 800
    assert silence_limit(section, "checkpoint", slowest=20.0) == math.inf


def test_a_time_out_that_would_come_after_the_last_line_is_refused() -> None:
    tree = {"run": {"output_dir": "x"}, "data": {"train": ["x"]}, "watchdog": {"checkpoint_seconds": 7200}}
    (problem,) = check_config(RunConfig.model_validate(tree))
    assert "watchdog.checkpoint_seconds (7200) must be below watchdog.collective_seconds (1800)" in problem
    assert "raise the latter to 14400" in problem
    tree["watchdog"] |= {"enabled": False}  # type: ignore[operator]
    assert check_config(RunConfig.model_validate(tree)) == []


def test_signs_of_an_earlier_start_and_half_written_ones_are_not_read(tmp_path: Path) -> None:
    folder = SignFolder(tmp_path, "s")
    folder.write(sign(0))
    folder.write(sign(0, count=3, place="x" * 300))
    folder.write(sign(0, count=4))
    SignFolder(tmp_path, "older").write(replace(sign(1), start="older"))
    (tmp_path / "rank_00002.json").write_text('{"start": "s"')
    assert folder.read(4) == {0: sign(0, count=4)}


def test_the_first_verdict_counts(tmp_path: Path) -> None:
    folder = SignFolder(tmp_path, "s")
    assert folder.verdict() is None
    assert folder.declare("rank 1") == "rank 1"
    assert folder.declare("rank 2") == "rank 1"
    assert SignFolder(tmp_path, "next start").verdict() is None
    assert os.listdir(tmp_path) == ["hang.json"]


def test_only_work_that_nobody_else_delays_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    heartbeat = Heartbeat()
    for step in (1, 2, 3):
        heartbeat.begin_step(step)
        for stage, seconds in (("forward", 1.0), ("backward", 2.0), ("losses", 4.0)):
            now[0] += 0.5 if stage == "forward" else 0.0
            heartbeat.enter(stage)
            now[0] += seconds
        heartbeat.end_step()
    assert heartbeat.take_work() == (1.5, 7.5)  # the first step, which compiles and connects, is left out
    assert heartbeat.slowest("step") == 7.5
    assert heartbeat.kind == "step"


def test_a_rank_is_slow_after_three_intervals_and_compared_with_its_pipeline_stage(tmp_path: Path) -> None:
    metrics = MetricsLog(tmp_path, is_active=True, use_tensorboard=False)
    stragglers = Stragglers(
        0.3, ["a", "a", "b", "b", "c", "c"], num_stages=2, metrics=metrics, heartbeat=Heartbeat(), every=1
    )
    for step, slow in enumerate([2.0, 1.0, 2.0, 2.0, 2.0, 2.0]):
        stragglers.note(step, [1.0, 1.0, slow, 5.0, 5.0, 5.0], step_seconds=10.0)
    assert read_metrics(tmp_path) == [
        {"step": step, "slow_rank": 2, "slow_host": "b", "slow_share": 1.0} for step in (4, 5)
    ]
    assert stragglers.find([1.0, 1.0, 1.4, 5.0, 5.0, 5.0], step_seconds=10.0) == {}  # nobody feels that
    assert stragglers.find([1.0, 1.0, 1.2, 5.0, 5.0, 5.0], step_seconds=1.0) == {}
