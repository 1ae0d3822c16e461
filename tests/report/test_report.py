"""Curves of a run: the last record of a step counts, the page needs nothing beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from reading_rights import unreadable

from pretrain.errors import DataError
from pretrain.metrics import read_metrics
from pretrain.report.__main__ import report
from pretrain.report.curves import series, without_undone


def write_run(folder: Path) -> Path:
    records = [{"step": s, "mlm_loss": 9 - s, "contrastive_loss": 1.0, "grad_norm": 1.0, "lr": 0.1} for s in (1, 2, 3)]
    records += [{"step": 2, "mlm_loss": 6.5, "contrastive_loss": 1.0, "grad_norm": 1.0, "lr": 0.1}]
    records += [{"step": 3, "validation_mlm_loss": 5.5, "validation_accuracy": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.yaml").write_text("run: {name: '<script>'}\n")
    return folder


def test_a_step_trained_twice_counts_once() -> None:
    records = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 9.0}, {"step": 2, "loss": 2.0}, {"step": 3, "other": 1.0}]
    assert series(records, "loss") == ([1, 2], [3.0, 2.0])


def test_steps_that_a_return_to_a_checkpoint_undid_do_not_count() -> None:
    """Killed after step 4 and continued from step 2, of which step 3 is trained again so far."""
    first = [{"step": step, "loss": 5.0, "lr": 0.1} for step in (1, 2, 3, 4)]
    validation, saved = {"step": 4, "validation_mlm_loss": 5.0}, {"step": 2, "save_write_seconds": 1.0}
    again = {"step": 3, "loss": 4.0, "lr": 0.1}
    assert without_undone([*first, validation, saved]) == [*first, validation, saved]
    assert without_undone([*first, validation, saved, again]) == [*first[:2], saved, again]


def test_picture_and_page_are_written_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(write_run(tmp_path))
    printed = capsys.readouterr().out
    picture, page = tmp_path / "loss_curves.png", tmp_path / "report.html"
    assert str(picture) in printed
    assert str(page) in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert "data:image/png;base64," in text
    assert "<script>" not in text


def test_the_page_says_how_fast_the_run_was(tmp_path: Path) -> None:
    parts = {"data": 1, "forward": 2, "backward": 4, "optimizer": 2, "communication": 0, "host": 1}
    times = {f"{part}_seconds": seconds / 100 for part, seconds in parts.items()}
    speed = {"tokens_per_second": 12345.0, "model_tflops": 0.5, "mfu": 0.4123, "step_seconds": 0.1, **times}
    records = [{"step": step, "mlm_loss": 1.0, "lr": 0.1, **speed} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    report(tmp_path)
    text = (tmp_path / "report.html").read_text()
    for words in ("12,345", "41.2%", "data 10.0 %, forward 20.0 %, backward 40.0 %"):
        assert words in text


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (write_run(tmp_path) / "loss_curves.png").mkdir()
    with pytest.raises(DataError, match="cannot be written"):
        report(tmp_path)


def test_a_line_that_is_no_record_is_left_out(tmp_path: Path) -> None:
    with (write_run(tmp_path) / "metrics.jsonl").open("a") as file:
        file.write('5\n{"loss": 1.0}\n')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 2, 3]


def test_a_run_without_records_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl: no records yet"):
        report(tmp_path)
    with pytest.raises(DataError, match=r"nowhere: no such folder; give the folder of a run"):
        report(tmp_path / "nowhere")
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(DataError, match=r"metrics\.jsonl: is a file; give the folder of a run"):
        report(tmp_path / "metrics.jsonl")


def test_lines_that_are_no_records_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (write_run(tmp_path) / "metrics.jsonl").open("a") as file:
        file.write('5\n{"step": 4, "mlm_loss": "high"}\n{"step": 5, "mlm_lo')
    report(tmp_path)
    assert "metrics.jsonl: skipped 2 lines that are no records (the first is line 6)" in capsys.readouterr().out


def test_a_description_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    path = write_run(tmp_path) / "config.yaml"
    with unreadable(path), pytest.raises(DataError, match=rf"^{path}: cannot be read: Permission denied"):
        report(tmp_path)
