"""Ranks that are killed or signalled from outside while they train: how the others end, and what a new start makes."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from fault_records import FaultRecorder
from live_ranks import LiveRanks, last_step, live_ranks, state_of
from small_runs import write_small_run

from pretrain.checkpoint.manifest import CheckpointManifest, list_checkpoints
from pretrain.metrics import read_metrics
from pretrain.parallel import meeting
from pretrain.resilience import stop_request
from pretrain.resilience.stop_request import EXIT_PREEMPTED

pytestmark = pytest.mark.slow

STEPS, SAVE_EVERY = 30, 5
RUN: dict[str, Any] = {
    "train__steps": STEPS,
    "train__eval_every": 15,
    "checkpoint": {"every_steps": SAVE_EVERY, "keep": 2},
}
END_SECONDS = 30.0  # within which ranks end whose peer has died; a second or two where the machine is free


@pytest.fixture(scope="module", params=[1, 2])
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The state at the end of a run of one or two ranks that nobody disturbed."""
    config = write_small_run(tmp_path_factory.mktemp("clean"), **RUN)
    with live_ranks(request.param, config) as ranks:
        assert ranks.wait() == [0] * request.param, ranks.output()
    return state_of(ranks.run, STEPS)


def last_saved(run: Path) -> int:
    found = list_checkpoints(run / "checkpoints")
    return CheckpointManifest.load(found[0]).step if found else 0


def finish(config: Path, undisturbed: dict[str, str]) -> None:
    """Go on to the end, which must be that of the undisturbed run; it has as many state files as ranks, and one."""
    world_size = len(undisturbed) - 1
    with live_ranks(world_size, config) as ranks:
        assert ranks.wait() == [0] * world_size, ranks.output()
    assert state_of(ranks.run, STEPS) == undisturbed


@pytest.mark.parametrize("undisturbed", [2], indirect=True)
@pytest.mark.parametrize("num_kills", [3, pytest.param(16, marks=pytest.mark.soak)])
def test_a_killed_rank_ends_the_others_and_a_new_start_goes_on(
    num_kills: int, undisturbed: dict[str, str], tmp_path: Path, fault: FaultRecorder
) -> None:
    rng = random.Random(num_kills)
    config = write_small_run(tmp_path, **RUN)
    for step in sorted(rng.sample(range(SAVE_EVERY + 1, STEPS - 4), num_kills)):
        victim = rng.randrange(2)
        with live_ranks(2, config) as ranks:
            seconds = ranks.wait_for_new_record()
            ranks.wait_for_step(step)
            ranks.send(signal.SIGKILL, victim)
            codes = ranks.wait(END_SECONDS)
        assert codes[victim] == -signal.SIGKILL
        assert codes[1 - victim] == 1, ranks.output()
        lost = last_step(ranks.run) - last_saved(ranks.run)
        assert 0 <= lost <= SAVE_EVERY + 1  # a save may have been about to begin
        fault.record("kill", injected=1, survived=1, lost_steps=lost, recovery_seconds=seconds)
    finish(config, undisturbed)


@pytest.mark.parametrize("undisturbed", [2], indirect=True)
@pytest.mark.usefixtures("hangup_is_heard")
def test_a_signal_to_any_rank_stops_all_at_one_step(
    undisturbed: dict[str, str], tmp_path: Path, fault: FaultRecorder
) -> None:
    config = write_small_run(tmp_path, **RUN)
    wishes = ((signal.SIGUSR1, 0), (signal.SIGUSR2, 1), (signal.SIGTERM, 0, 1), (signal.SIGINT, 1), (signal.SIGHUP, 0))
    for step, (number, *receivers) in zip((3, 8, 13, 18, 23), wishes, strict=True):
        with live_ranks(2, config) as ranks:
            seconds = ranks.wait_for_new_record()
            ranks.wait_for_step(step)
            ranks.send(signal.Signals(number), *receivers)
            assert ranks.wait() == [EXIT_PREEMPTED] * 2, ranks.output()
        saved = last_saved(ranks.run)
        assert saved == last_step(ranks.run) < STEPS
        assert ranks.output(0).count(f"step-{saved:07d} in ") <= 1
        fault.record("stop-signal", injected=1, survived=1, lost_steps=0, recovery_seconds=seconds)
    finish(config, undisturbed)


HELD, GO = "held", "go"


def hold_saves(folder: Path, echo_seconds: float) -> None:
    """In a rank: an fsync of a state file waits for the file `go`; a second signal counts as one after some time."""
    stop_request.ECHO_SECONDS = echo_seconds
    fsync = os.fsync

    def hold(descriptor: int) -> None:
        is_state = os.readlink(f"/proc/self/fd/{descriptor}").endswith(".safetensors")
        if is_state and not (folder / GO).exists():
            (folder / HELD).touch()
            while not (folder / GO).exists():
                time.sleep(0.01)
        fsync(descriptor)

    os.fsync = hold


def stop_in_a_save(ranks: LiveRanks, folder: Path) -> None:
    """Send a first signal, and wait until what it asks for is on its way to the disk."""
    ranks.wait_for_step(2)
    ranks.send(signal.SIGTERM)
    ranks.wait_until((folder / HELD).exists)


@pytest.mark.parametrize("undisturbed", [1], indirect=True)
def test_a_second_signal_while_saving(undisturbed: dict[str, str], tmp_path: Path, fault: FaultRecorder) -> None:
    config = write_small_run(tmp_path, **{**RUN, "checkpoint": {"every_steps": STEPS, "keep": 2}})
    with live_ranks(1, config, before=lambda _: hold_saves(tmp_path, echo_seconds=0.4)) as ranks:
        stop_in_a_save(ranks, tmp_path)
        time.sleep(0.6)
        ranks.send(signal.SIGTERM)
        assert ranks.wait(5) == [128 + signal.SIGTERM]
    assert list_checkpoints(ranks.run / "checkpoints") == []
    (tmp_path / HELD).unlink()
    (ranks.run / "metrics.jsonl").unlink()
    with live_ranks(1, config, before=lambda _: hold_saves(tmp_path, echo_seconds=60)) as ranks:
        stop_in_a_save(ranks, tmp_path)
        ranks.send(signal.SIGTERM)
        (tmp_path / GO).touch()
        assert ranks.wait() == [EXIT_PREEMPTED], ranks.output()
    assert last_saved(ranks.run) == last_step(ranks.run)
    fault.record("second-signal", injected=2, survived=2)
    finish(config, undisturbed)


@pytest.mark.fault("stop-signal")
def test_a_rank_that_waits_for_another_one_says_so_and_can_be_stopped(tmp_path: Path) -> None:
    """Rank 1 never comes; rank 0 is in the store's C++ code."""

    def late(rank: int) -> None:
        meeting.FIRST_WORDS_SECONDS = 0.2
        time.sleep(60 * rank)

    with live_ranks(2, write_small_run(tmp_path, **RUN), before=late) as ranks:
        ranks.wait_until(lambda: "waiting for 1 of 2 ranks (1) at 127.0.0.1:" in ranks.output(0))
        assert " s left" in ranks.output(0)
        ranks.send(signal.SIGTERM, 0)
        assert ranks.wait(20, [0]) == [EXIT_PREEMPTED], ranks.output()
        assert "SIGTERM: stopped before the first step" in ranks.output(0)
    assert not (tmp_path / "run").exists()


def test_a_second_run_is_refused_and_a_dead_one_holds_nothing(tmp_path: Path, fault: FaultRecorder) -> None:
    config = write_small_run(tmp_path, **{**RUN, "train__steps": 100_000})
    with live_ranks(1, config) as first:
        first.wait_for_step(1)
        (tmp_path / "second").mkdir()
        other = tmp_path / "second" / "run.yaml"
        other.write_text(config.read_text())
        with live_ranks(1, other) as second:
            assert second.wait() == [1]
        (line,) = second.errors(0)
        assert f"in use by host {os.uname().nodename}, process {first.pids[0]}, SLURM job " in line
        assert first.is_running()
        first.send(signal.SIGKILL)
    with live_ranks(1, config) as third:
        third.wait_for_new_record()
    fault.record("two-runs", injected=2, survived=2)


@pytest.mark.fault("kill")
def test_the_records_of_a_killed_run_have_no_gap(tmp_path: Path) -> None:
    """Whatever was cut off is trained again, and what is read is every step once."""
    config = write_small_run(tmp_path, **RUN)
    with live_ranks(1, config) as ranks:
        ranks.wait_for_step(SAVE_EVERY + 2)
        ranks.send(signal.SIGKILL)
    with (ranks.run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 9, "lo')  # what a kill in the middle of a line leaves
    with live_ranks(1, config) as ranks:
        assert ranks.wait() == [0], ranks.output()
    assert {record["step"] for record in read_metrics(ranks.run) if "loss" in record} == set(range(1, STEPS + 1))
