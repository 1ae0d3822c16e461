"""Records of a run: written always, read back whole, never a reason to stop."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.metrics import MetricsLog, read_metrics


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

    def full(self: Path, mode: str) -> None:
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

    def half(self: Path, mode: str) -> None:
        with written(self, mode) as file:
            file.write(b'{"step": 1, "lo')
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", half)
    log.write({"step": 1})
    monkeypatch.undo()
    log.write({"step": 2})
    assert read_metrics(tmp_path) == [{"step": 2}]


def test_tensorboard_events_are_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, is_active=True, use_tensorboard=True)
    log.write({"step": 1, "loss": 2.5, "validation_accuracy": 0.25})
    log.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.stat().st_size > 0


@pytest.mark.fault("logging")
def test_a_folder_without_room_for_events_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    metrics = MetricsLog(tmp_path, is_active=True, use_tensorboard=True)
    metrics.write({"step": 1, "loss": 2.0})
    metrics.close()
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
