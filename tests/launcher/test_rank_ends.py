"""One reason and one exit code from several ranks that have ended."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pretrain.errors import reason_file
from pretrain.launcher import rank_ends
from pretrain.launcher.rank_ends import RankEnds
from pretrain.resilience.stop_request import NOTHING_TO_SAVE

TERM = {int(signal.SIGTERM)}
# What a rank of a test does, as a shell command; `say` leaves a reason.
FOR_EVER = "exec sleep 60"


def end(folder: Path, *ranks: str, handed_on: set[int] | None = None) -> tuple[int, str | None]:
    """The verdict on ranks that run these shell commands."""
    processes = {rank: subprocess.Popen(["sh", "-c", command]) for rank, command in enumerate(ranks)}
    pids = {rank: process.pid for rank, process in processes.items()}
    ends = RankEnds(folder)
    give_up = time.monotonic() + 20
    try:
        while not ends.have_all_ended(pids):
            assert time.monotonic() < give_up
            time.sleep(0.01)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return ends.verdict(pids, handed_on or set())


def leave(folder: Path, rank: int, text: str, *, is_consequence: bool = False) -> None:
    record = {"text": text, "is_consequence": is_consequence}
    reason_file(folder, rank).write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("ranks", "code"),
    [
        (("exit 0", "exit 0"), 0),
        (("exit 75", "exit 75"), 75),
        (("exit 75", "sleep 0.2; exit 1"), 75),  # lost contact with the one that was stopped
        (("sleep 0.2; exit 1", "exit 124"), 124),
        (("exit 1", "sleep 0.2; exit 124"), 124),
        (("exit 143", "exit 143"), 143),
    ],
)
def test_codes(tmp_path: Path, ranks: tuple[str, ...], code: int) -> None:
    if "exit 1" in " ".join(ranks):
        leave(tmp_path, 0 if ranks[0].endswith("exit 1") else 1, "error: lost contact", is_consequence=True)
    assert end(tmp_path, *ranks)[0] == code


def test_others_are_ended_and_the_first_reason_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_ends, "_SHORT_PATIENCE", 0.1)
    leave(tmp_path, 1, "error: no such file")
    assert end(tmp_path, FOR_EVER, "exit 1", FOR_EVER) == (1, "[rank 1] error: no such file")
    leave(tmp_path, 1, "error: train.stepz: unknown key")
    assert end(tmp_path, FOR_EVER, "exit 2", FOR_EVER) == (2, "error: train.stepz: unknown key")


def test_a_consequence_waits_for_its_cause(tmp_path: Path) -> None:
    leave(tmp_path, 0, "error: lost contact", is_consequence=True)
    leave(tmp_path, 1, "Traceback: a bug")
    assert end(tmp_path, "exit 1", "sleep 1.3; exit 1") == (1, "[rank 1] Traceback: a bug")


def test_a_killed_rank_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_ends, "_SHORT_PATIENCE", 0.1)
    code, reason = end(tmp_path, FOR_EVER, "kill -9 $$")
    assert code == 137
    assert reason is not None
    assert "rank 1 (process" in reason
    assert "was ended by SIGKILL, by the system if memory ran out" in reason


def test_ranks_that_a_signal_of_the_launcher_met_before_they_listened(tmp_path: Path) -> None:
    assert end(tmp_path, "kill -TERM $$", "kill -TERM $$", handed_on=TERM) == (75, NOTHING_TO_SAVE)
    assert end(tmp_path, "kill -TERM $$", "kill -TERM $$")[0] == 143
