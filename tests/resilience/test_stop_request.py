"""Requests to stop by a file beside the signals; how often to save, by what a save costs and how often a job fails."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from child_process import fork
from torch.distributed import HashStore

from pretrain.resilience import stop_request
from pretrain.resilience.stop_request import StopRequest
from pretrain.runlog import get_logger, start_logging
from pretrain.saving import best_save_interval


@pytest.mark.parametrize(("cost", "hours"), [(10.0, 3.0), (60.0, 24.0), (1.0, 0.1)])
def test_the_interval_loses_less_time_than_half_or_twice_of_it(cost: float, hours: float) -> None:
    def lost(interval: float) -> float:
        """Seconds lost per second of work: saves, and on average half an interval for every failure."""
        return cost / interval + (interval / 2 + cost) / (3600 * hours)

    best = best_save_interval(cost, hours)
    assert lost(best) < lost(best / 2)
    assert lost(best) < lost(best * 2)


def test_a_job_that_fails_all_the_time_still_works_half_of_it() -> None:
    assert best_save_interval(100.0, 0.01) == 100.0


def test_a_file_is_a_request_while_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_request, "LOOK_SECONDS", 0.0)
    stop = StopRequest()
    assert not stop.is_set
    stop.watch(tmp_path / "stop")
    assert not stop.is_set
    (tmp_path / "stop").touch()
    assert stop.is_set
    (tmp_path / "stop").unlink()
    assert not stop.is_set


def test_the_file_is_not_looked_for_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(stop_request.time, "monotonic", lambda: now[0])
    stop = StopRequest()
    stop.watch(tmp_path / "stop")
    assert not stop.is_set
    (tmp_path / "stop").touch()
    now[0] += 0.9 * stop_request.LOOK_SECONDS
    assert not stop.is_set
    now[0] += 0.2 * stop_request.LOOK_SECONDS
    assert stop.is_set


def wait_for(is_so: Callable[[], object]) -> None:
    """For what another thread does in a moment."""
    end = time.monotonic() + 20
    while not is_so() and time.monotonic() < end:
        time.sleep(0.01)


def code_of(work: Callable[[], object], log: Path) -> int:
    """The exit code of `work` in a process of its own, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(fork(work, log), 0)[1])


def test_after_nohup_a_closed_terminal_stops_nothing(tmp_path: Path) -> None:
    def work(at_start: signal.Handlers) -> None:
        signal.signal(signal.SIGHUP, at_start)
        stop = StopRequest()
        stop.install()
        stop.connected()
        os.kill(os.getpid(), signal.SIGHUP)
        sys.exit(10 if stop.is_set else 11)

    assert code_of(lambda: work(signal.SIG_IGN), tmp_path / "ignored") == 11
    assert code_of(lambda: work(signal.SIG_DFL), tmp_path / "heard") == 10


def test_before_the_ranks_have_met_a_signal_ends_the_process(tmp_path: Path) -> None:
    def work() -> None:
        StopRequest(rank=1).install()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    assert code_of(work, tmp_path / "log") == 75
    assert (
        tmp_path / "log"
    ).read_text() == "[rank 1] SIGTERM: stopped before the first step; there is nothing to save\n"


@pytest.mark.fault("second-signal")
@pytest.mark.usefixtures("hangup_is_heard")
def test_signals_are_heard_while_the_main_thread_is_in_cpp(tmp_path: Path) -> None:
    """In a store that waits for a key that nobody sets; Python's own handlers would run after it."""

    def work() -> None:
        stop_request.ECHO_SECONDS = 0.2
        stop = StopRequest()
        stop.install()
        stop.connected()
        HashStore().wait(["never"], timedelta(minutes=5))

    log = tmp_path / "log"
    process = fork(work, log)
    time.sleep(0.3)
    for words in ("SIGHUP: will save at the end of this step", "SIGTERM again: stops at once"):
        os.kill(process, signal.SIGHUP if "HUP" in words else signal.SIGTERM)
        wait_for(lambda words=words: words in log.read_text())  # type: ignore[misc]
        assert words in log.read_text()
        time.sleep(0.3)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 128 + signal.SIGTERM


def test_a_signal_in_the_middle_of_a_line_is_heard_and_raises_nothing(tmp_path: Path) -> None:
    """Python's streams raise where a signal's handler writes to the one that was being written to."""

    class Slow(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: object) -> int:
            os.kill(os.getpid(), signal.SIGTERM)
            return file.write(bytes(data))  # type: ignore[call-overload]

    def work() -> None:
        stop = StopRequest(rank=3)
        stop.install()
        stop.connected()
        sys.stderr = io.TextIOWrapper(io.BufferedWriter(Slow()), write_through=True)
        start_logging(None, rank=0)
        get_logger("test").info("a line of training")
        wait_for(lambda: (tmp_path / "direct").read_text())
        sys.exit(0 if stop.is_set else 1)

    with (tmp_path / "lines").open("wb", buffering=0) as file:
        process = fork(work, tmp_path / "direct")
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    lines = (tmp_path / "lines").read_text()
    assert lines.splitlines() == ["a line of training", "stopping after SIGTERM"]
    assert (tmp_path / "direct").read_text().startswith("[rank 3] SIGTERM: will save at the end of this step")
