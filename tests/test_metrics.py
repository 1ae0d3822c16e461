"""Records of a run: written always, read back whole, never a reason to stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from reading_rights import unreadable

from pretrain.errors import DataError
from pretrain.metrics import MetricsLog, read_metrics, read_records


def test_records_come_back_in_order(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, is_active=True, use_tensorboard=False)
    records = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 0.1 + 0.2}]
    for record in records:
        log.write(record)
    assert read_metrics(tmp_path) == records


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    MetricsLog(tmp_path, is_active=False, use_tensorboard=True).write({"step": 1})
    assert list(tmp_path.iterdir()) == []


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step":1}\n{"step":2,"lo')
    assert read_metrics(tmp_path) == [{"step": 1}]


@pytest.mark.fault("logging")
def test_a_full_disk_does_not_stop_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(tmp_path, is_active=True, use_tensorboard=False)

    def full(self: Path, mode: str, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    log.write({"step": 1})
    monkeypatch.undo()
    log.write({"step": 2})
    assert read_metrics(tmp_path) == [{"step": 2}]


@pytest.mark.fault("logging")
def test_half_a_line_does_not_swallow_the_next_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(tmp_path, is_active=True, use_tensorboard=False)
    written = Path.open

    def half(self: Path, mode: str, **options: Any) -> None:
        with written(self, mode, **options) as file:
            file.write(b'{"step": 1, "lo')
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", half)
    log.write({"step": 1})
    monkeypatch.undo()
    log.write({"step": 2})
    assert read_metrics(tmp_path) == [{"step": 2}]


def board_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of every curve, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def write_board(folder: Path, after: int, last: int, value: float) -> MetricsLog:
    """Steps after `after` up to `last`, with a validation at every second one; nobody closes the log, as in a kill."""
    log = MetricsLog(folder, is_active=True, use_tensorboard=True)
    log.begin(after)
    for step in range(after + 1, last + 1):
        log.write({"step": step, "loss": value})
        if step % 2 == 0:
            log.write({"step": step, "validation_accuracy": value})
    return log


def test_a_killed_run_leaves_every_event(tmp_path: Path) -> None:
    log = write_board(tmp_path, 0, 3, 2.5)
    found = board_of(tmp_path)
    assert found == {"train/loss": [(1, 2.5), (2, 2.5), (3, 2.5)], "validation/accuracy": [(2, 2.5)]}
    log.close()


def test_steps_that_are_trained_again_appear_once_on_the_board(tmp_path: Path) -> None:
    """Killed after step 9, continued from step 4, and rolled back from step 7 to 5."""
    first = write_board(tmp_path, 0, 9, 1.0)
    again = write_board(tmp_path, 4, 7, 2.0)
    again.begin(5)
    for step in (6, 7, 8):
        again.write({"step": step, "loss": 3.0})
    again.close()
    found = board_of(tmp_path)
    assert found["train/loss"] == [*((step, 1.0) for step in range(1, 5)), (5, 2.0), (6, 3.0), (7, 3.0), (8, 3.0)]
    assert found["validation/accuracy"] == [(2, 1.0), (4, 1.0)]
    first.close()


@pytest.mark.fault("logging")
def test_a_folder_without_room_for_events_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    metrics = MetricsLog(tmp_path, is_active=True, use_tensorboard=True)
    metrics.begin(0)
    metrics.write({"step": 1, "loss": 2.0})
    metrics.close()
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


@pytest.mark.fault("logging")
def test_a_line_torn_by_a_power_loss_is_counted_and_swallows_no_record(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\0\0\0\n[2]\n{"step": "x"}\n{"step": true}\n{"step":2,"lo')
    MetricsLog(tmp_path, is_active=True, use_tensorboard=False).write({"step": 3})
    assert read_records(tmp_path) == ([{"step": 1}, {"step": 3}], [2, 3, 4, 5, 6])


def test_records_that_may_not_be_read_are_an_error_of_one_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    with unreadable(path), pytest.raises(DataError, match=f"^{path}: cannot be read: Permission denied$"):
        read_metrics(tmp_path)
