"""The measurements of a run: always metrics.jsonl, and TensorBoard events if enabled.

A run that resumes appends; a step that is trained again writes its record again, and readers take the last one. Its
TensorBoard events begin with a mark that makes TensorBoard drop the points of earlier starts from that step on.
Failing to log never stops training: it is reported once and the run continues.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from pretrain import durable
from pretrain.errors import DataError
from pretrain.runlog import get_logger

METRICS_FILE = "metrics.jsonl"

log = get_logger(__name__)


class MetricsLog:
    """Writes the records of one run; only rank 0 has one that `is_active`."""

    def __init__(self, run_dir: Path, *, is_active: bool, use_tensorboard: bool) -> None:
        self._path = run_dir / METRICS_FILE
        self._is_active = is_active
        self._has_failed = False
        self._board_dir = run_dir / "tensorboard" if is_active and use_tensorboard else None
        self._board: Any = None

    def begin(self, step: int) -> None:
        """Training goes on after `step`: what TensorBoard shows of later steps is about to be trained again."""
        if self._board_dir is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.close()
        try:
            self._board = SummaryWriter(str(self._board_dir), purge_step=step + 1)
        except OSError as error:
            log.warning("no TensorBoard events: %s", error)
            self._board = None

    def write(self, record: dict[str, float | int | str]) -> None:
        """Append one record; numbers also go to TensorBoard at their `step`."""
        if not self._is_active:
            return
        self._append(record)
        try:
            if self._board is not None:
                self._write_board(record)
        except OSError as error:
            log.warning("no more TensorBoard events: %s", error)
            self._board = None

    def _append(self, record: dict[str, float | int | str]) -> None:
        """Write a line; if that fails the record is lost, and the next one is tried all the same."""
        try:
            durable.append_line(self._path, orjson.dumps(record))
        except OSError as error:
            if not self._has_failed:
                log.warning("records of metrics are lost until there is room: %s", error)
            self._has_failed = True
        else:
            self._has_failed = False

    def close(self) -> None:
        """Flush what is buffered."""
        try:
            if self._board is not None:
                self._board.close()
        except OSError as error:
            log.warning("the last TensorBoard events are lost: %s", error)

    def _write_board(self, record: dict[str, float | int | str]) -> None:
        step = int(record["step"])
        for name, value in record.items():
            if name != "step" and not isinstance(value, str):
                group = "validation" if name.startswith("validation_") else "train"
                self._board.add_scalar(f"{group}/{name.removeprefix('validation_')}", value, step)
        # Like metrics.jsonl: a kill loses no event. A restart writes only those of the steps that it trains again.
        self._board.flush()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All records of a run, in order of writing; lines that are none are left out, with one warning.

    Raises:
        DataError: the file is there and cannot be read.
    """
    records, bad_lines = read_records(run_dir)
    if bad_lines:
        log.warning("%s", describe_bad_lines(run_dir, bad_lines))
    return records


def read_records(run_dir: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """All records of a run, and the numbers (from 1) of the lines that are none: torn by a power loss, for example.

    Raises:
        DataError: the file is there and cannot be read.
    """
    path = run_dir / METRICS_FILE
    try:
        if not path.is_file():  # a device may never end
            return [], []
        lines = path.read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return [], []
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    records, bad_lines = [], []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        record = _parse(line)
        if record is None:
            bad_lines.append(number)
        else:
            records.append(record)
    return records, bad_lines


def describe_bad_lines(run_dir: Path, bad_lines: Sequence[int]) -> str:
    """One sentence about the lines that `read_records` left out."""
    what = "1 line that is no record" if len(bad_lines) == 1 else f"{len(bad_lines):,} lines that are no records"
    return f"{run_dir / METRICS_FILE}: skipped {what} (the first is line {bad_lines[0]})"


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record of a line: a JSON object with the number of a step; None if it is something else."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None
