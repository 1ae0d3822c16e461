"""What a run knows of itself, in RUN/run.json: its own name, and the step of its newest checkpoint.

The name is made once and goes into the manifest of every checkpoint, so that a folder that was copied in from another
run is told apart. The step outlives `checkpoints/`: a run that has saved does not begin again because that folder is
not mounted.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from pretrain import durable
from pretrain.checkpoint.manifest import (
    CheckpointManifest,
    CheckpointUnreadableError,
    find_checkpoint,
    list_checkpoints,
    step_folder,
)
from pretrain.errors import CheckpointError, TacoError
from pretrain.metrics import read_metrics

RECORD_FILE = "run.json"
ALLOWS_OTHER_RUN = "checkpoint.run"  # after --allow-change: a checkpoint of another run, or a renamed one


@dataclass(frozen=True)
class RunRecord:
    """The content of run.json; `saved_step` is 0 until the run has saved."""

    run_id: str
    saved_step: int = 0
    saved_at: str = ""

    @classmethod
    def load(cls, run: Path) -> RunRecord | None:
        """The record of the run in the folder `run`; None if it has none, as those of older releases.

        Raises:
            TacoError: it cannot be read, or it is no such record.
        """
        path = run / RECORD_FILE
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            record = cls(str(tree["run_id"]), int(tree["saved_step"]), str(tree["saved_at"]))
            if not record.run_id:
                raise ValueError("run_id is empty")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise TacoError(f"{path}: cannot be read: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise TacoError(
                f"{path}: is no record of a run ({type(error).__name__}: {error}); remove it, and it is made again "
                "from the newest checkpoint"
            ) from None
        return record

    @classmethod
    def of(cls, run: Path) -> RunRecord:
        """The record of the run in the folder `run`; made if there is none, with the name that its checkpoints have.

        Raises:
            TacoError: as for `load`.
            OSError: it cannot be written.
        """
        record = cls.load(run)
        if record is None:
            record = cls(_name_in_checkpoints(run) or uuid.uuid4().hex, recorded_step(run))
            record.save(run)
        return record

    def save(self, run: Path) -> None:
        """Write the record durably into the folder `run`. Raises OSError."""
        durable.write_text(run / RECORD_FILE, json.dumps(asdict(self), indent=1) + "\n")


def note_saved(run: Path, run_id: str, step: int) -> None:
    """Record that the run has committed the checkpoint of `step`. Raises OSError."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    replace(RunRecord(run_id), saved_step=step, saved_at=now).save(run)


def own_run_id(root: Path) -> str | None:
    """The name of the run whose `checkpoints/` is `root`; None if `root` is another folder, or has no record beside it.

    Raises:
        TacoError: the record cannot be read.
    """
    for place in (root.absolute(), root.resolve()):  # `.`, a link from elsewhere, or a link to elsewhere
        record = RunRecord.load(place.parent) if place.name == "checkpoints" else None
        if record is not None:
            return record.run_id
    return None


def is_own(folder: Path, run_id: str | None) -> bool:
    """Whether a checkpoint is one of the run `run_id` (None: of any), under its own name, with a sound manifest.

    Raises:
        CheckpointUnreadableError: the manifest cannot be read.
    """
    try:
        manifest = CheckpointManifest.load(folder)
    except CheckpointUnreadableError:
        raise
    except CheckpointError:
        return False
    is_of_run = run_id is None or manifest.run_id in ("", run_id)
    return is_of_run and folder.name == step_folder(folder.parent, manifest.step).name


def find_own_checkpoint(path: Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest of the run there, which must be that run's own.

    Raises:
        CheckpointError: there is none, or the newest one was renamed or is of another run.
        TacoError: the record of the run cannot be read.
    """
    folder = find_checkpoint(path)
    if folder == path:
        return folder
    try:
        manifest = CheckpointManifest.load(folder)
    except CheckpointUnreadableError:
        raise
    except CheckpointError:
        return folder  # whoever reads it says what is damaged
    run_id = own_run_id(folder.parent)
    if is_own(folder, run_id):
        return folder
    whose = "" if run_id is None else f" of run {manifest.run_id or 'without a name'}, and this is run {run_id}"
    raise CheckpointError(
        f"{folder}: is the newest here, but its manifest says step {manifest.step}{whose}; move it elsewhere, or name "
        "the step-NNNNNNN folder that you mean"
    )


def recorded_step(run: Path) -> int:
    """The step of the newest checkpoint that the run says to have saved; 0 if it never did.

    Older releases left no run.json; their mark of a complete run and their records of saves say the same.

    Raises:
        TacoError: a record is there and cannot be read.
    """
    record = RunRecord.load(run)
    if record is not None and record.saved_step:
        return record.saved_step
    saves = [item["step"] for item in read_metrics(run) if "save_write_seconds" in item]
    return max([_done_step(run), *saves])


def _done_step(run: Path) -> int:
    path = run / "done.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["step"])
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise TacoError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        return 0


def _name_in_checkpoints(run: Path) -> str:
    """The name of the run in its newest checkpoint that has a sound manifest; empty if none has one."""
    for folder in list_checkpoints(run / "checkpoints"):
        try:
            return CheckpointManifest.load(folder).run_id
        except CheckpointUnreadableError:
            raise
        except CheckpointError:
            continue
    return ""
