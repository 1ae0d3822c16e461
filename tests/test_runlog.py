"""What people read: durations, counts, the time left, one file per rank."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

import pytest
from child_process import fork

from pretrain import runlog
from pretrain.runlog import Eta, format_count, format_seconds, get_logger, start_logging


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.4, "59s"), (185, "3m05s"), (7620, "2h07m"), (4 * 86400 + 3 * 3600, "4d03h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(950, "950"), (12_340, "12.3k"), (4_560_000, "4.56M"), (1.2e9, "1.2G")])
def test_counts(number: float, text: str) -> None:
    assert format_count(number) == text


def test_time_left_counts_from_where_this_process_began(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(runlog.time, "monotonic", lambda: clock[0])
    eta = Eta(done=50, total=100)
    assert eta.remaining(50) == float("inf")
    clock[0] += 20
    assert eta.remaining(60) == pytest.approx(80)


def test_every_rank_has_a_file_and_only_the_first_speaks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    for rank in (0, 1):
        start_logging(tmp_path, rank)
        get_logger("pretrain.trainer").info("hello from %d", rank)
        get_logger("pretrain.trainer").warning("careful %d", rank)
        get_logger("pretrain.trainer").error("broken %d", rank)
    logging.captureWarnings(False)
    logging.getLogger("taco").handlers.clear()
    assert capsys.readouterr().err == "hello from 0\ncareful 0\nbroken 0\n[rank 1] broken 1\n"
    assert "hello from 1" in (text := (tmp_path / "rank_00001.log").read_text())
    assert "careful 1" in text


def test_warnings_of_libraries_come_from_the_first_rank_alone(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        library = logging.getLogger("DeepSpeed")
        library.addHandler(logging.StreamHandler())
        start_logging(None, rank)
        start_logging(tmp_path, rank)
        warnings.showwarning("old spelling", UserWarning, "module.py", 1)
        library.warning("no such kernel")

    for rank in (0, 1):
        process = fork(lambda rank=rank: work(rank), tmp_path / f"console{rank}")  # type: ignore[misc]
        assert os.waitpid(process, 0)[1] == 0
    first, second = ((tmp_path / f"console{rank}").read_text() for rank in (0, 1))
    assert "no such kernel" in first  # the other warning is with pytest
    assert second == ""
    kept = (tmp_path / "rank_00001.log").read_text()
    assert "old spelling" in kept
    assert "no such kernel" in kept


@pytest.mark.fault("logging")
def test_a_log_folder_that_cannot_be_made_costs_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").write_text("a file")
    start_logging(tmp_path / "logs", 0)
    logging.getLogger("taco").handlers.clear()
    assert "no log file" in capsys.readouterr().err


def test_a_line_torn_by_a_power_loss_does_not_swallow_the_first_of_a_start(tmp_path: Path) -> None:
    (tmp_path / "rank_00000.log").write_text("torn")
    start_logging(tmp_path, 0)
    get_logger("pretrain.trainer").info("hello")
    logging.getLogger("taco").handlers.clear()
    torn, hello = (tmp_path / "rank_00000.log").read_text().splitlines()
    assert torn == "torn"
    assert hello.endswith("hello")
