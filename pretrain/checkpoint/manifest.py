"""What a checkpoint holds: its manifest, where checkpoints lie, and what differs from what was written."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pretrain import durable
from pretrain.durable import FileRecord
from pretrain.errors import CheckpointError

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
_STEP_FOLDER = re.compile(r"step-(\d{7,})")


class CheckpointVersionError(CheckpointError):
    """A checkpoint of another release: not damaged, so never set aside."""


class CheckpointUnreadableError(CheckpointError):
    """A file that this process may not or cannot read, which says nothing about what it holds: never set aside."""


@dataclass(frozen=True)
class Layout:
    """The process grid, ZeRO stage and precision of a run; for people, since the state can be read by any other."""

    data: int
    tensor: int
    pipeline: int
    zero_stage: int
    precision: str

    def __str__(self) -> str:
        return (
            f"tensor {self.tensor} x pipeline {self.pipeline} x data {self.data}, ZeRO-{self.zero_stage}, "
            f"{self.precision}"
        )


@dataclass(frozen=True)
class CheckpointManifest:
    """What a checkpoint holds, enough to refuse or to export it without opening a tensor.

    `run_id` is the name that its run gave itself (`run_record.py`); empty in checkpoints of older releases and in
    imported ones.
    """

    kind: str
    step: int
    consumed_samples: int
    layout: Layout
    model: dict[str, Any]
    vocab_size: int
    tokenizer_sha256: str
    config_sha256: str
    pad_token_id: int
    data: tuple[dict[str, Any], ...] = ()
    spikes: dict[str, Any] = field(default_factory=dict)
    files: tuple[FileRecord, ...] = ()
    run_id: str = ""
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """The text of manifest.json, with the hash of its own content under `self_xxh3_128`."""
        return durable.seal_json(asdict(self), "content")

    @classmethod
    def load(cls, folder: Path) -> CheckpointManifest:
        """Read and check `folder/manifest.json`.

        Raises:
            CheckpointVersionError: it has another format version.
            CheckpointUnreadableError: it is there and cannot be read.
            CheckpointError: it is missing or damaged.
        """
        path = folder / MANIFEST
        try:
            text = path.read_bytes()
            raw = json.loads(text.decode("utf-8"))
            if raw["format_version"] != FORMAT_VERSION:
                raise CheckpointVersionError(
                    f"{path}: format version {raw['format_version']}, this program reads {FORMAT_VERSION}; "
                    "continue with the release that wrote it"
                )
            if not durable.is_sealed(text, "content"):
                raise CheckpointError(f"{path}: content differs from what was written (xxh3-128)")
            del raw[durable.SELF_HASH]
            raw["layout"] = Layout(**raw["layout"])
            raw["files"] = tuple(FileRecord(**record) for record in raw["files"])
            raw["data"] = tuple(raw["data"])
            known = {item.name for item in fields(cls)}  # a later release may record more
            return cls(**{name: value for name, value in raw.items() if name in known})
        except durable.ABSENT:
            if folder.is_symlink() and not folder.exists():
                raise CheckpointUnreadableError(
                    f"{folder}: is a link to {folder.readlink()}, which is not there; mount that, or remove the link"
                ) from None
            raise CheckpointError(f"{path}: is missing; {folder} is no finished checkpoint") from None
        except OSError as error:
            raise _unreadable(folder, error) from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path}: is damaged: {type(error).__name__}: {error}") from None


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return root / f"step-{step:07d}"


def step_named(folder: Path) -> int:
    """The step in the name of a folder; 0 for a name of another kind."""
    match = _STEP_FOLDER.match(folder.name)
    return int(match[1]) if match else 0


def list_checkpoints(root: Path) -> list[Path]:
    """Folders of finished checkpoints, newest first; `.tmp` and `.bad` ones are none.

    Raises:
        CheckpointUnreadableError: `root` is there and cannot be listed.
    """
    found = [path for path in _entries(root) if _STEP_FOLDER.fullmatch(path.name)]
    return sorted(found, key=lambda path: (step_named(path), path.name), reverse=True)


def list_set_aside(root: Path) -> list[Path]:
    """Folders that were set aside, step-NNNNNNN.bad or, if that name was taken, step-NNNNNNN.2.bad; newest first."""
    found = [path for path in _entries(root) if _STEP_FOLDER.match(path.name) and path.suffix == ".bad"]
    return sorted(found, key=lambda path: (step_named(path), path.name), reverse=True)


def _entries(root: Path) -> list[Path]:
    try:
        return list(root.iterdir())
    except durable.ABSENT:
        return []
    except OSError as error:
        raise CheckpointUnreadableError(f"{root}: cannot be read: {error.strerror or error}") from None


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest under it (run folder or checkpoints/).

    Raises:
        CheckpointUnreadableError: a folder on the way cannot be read.
        CheckpointError: there is none.
    """
    if has_manifest(path):
        return path
    for root in (path / "checkpoints", path):
        if found := list_checkpoints(root):
            return found[0]
    raise CheckpointError(f"{path}: {_explain_none(path)}")


def _explain_none(path: Path) -> str:
    """Why there is no checkpoint to be found at `path`."""
    if not path.exists():
        return "no such folder; give a step-NNNNNNN folder, a run folder or its checkpoints/"
    for root in (path / "checkpoints", path):
        if set_aside := list_set_aside(root):
            names = ", ".join(folder.name for folder in set_aside[:3])
            return f"no checkpoint here but those that failed their verification ({names}); restore one"
    if (path / "run.lock").exists() or (path / "config.yaml").exists():
        return "this run has no checkpoint: it has not saved yet, or its checkpoints/ is not mounted"
    return "no checkpoint here; expected a step-NNNNNNN folder, a run folder or its checkpoints/"


def has_manifest(folder: Path) -> bool:
    """Whether `folder` is a checkpoint, good or not.

    Raises:
        CheckpointUnreadableError: it cannot be looked into.
    """
    try:
        return (folder / MANIFEST).is_file()
    except OSError as error:
        raise _unreadable(folder, error) from None


def find_problems(folder: Path, *, part: int = 0, num_parts: int = 1) -> list[str]:
    """What differs between a checkpoint and its manifest; checks every `num_parts`-th file, starting at `part`.

    Raises:
        CheckpointUnreadableError: a file is there and cannot be read, so nothing is known about it.
    """
    try:
        manifest = CheckpointManifest.load(folder)
    except CheckpointUnreadableError:
        raise
    except CheckpointError as error:
        return [str(error)]
    share = manifest.files[part::num_parts]
    outside = [record.name for record in share if not _is_inside(folder / record.name, folder)]
    problems = [f"{folder / MANIFEST}: names a file outside the checkpoint: {name!r}" for name in outside]
    try:
        damage = durable.find_damage(folder, [record for record in share if record.name not in outside])
    except OSError as error:
        raise _unreadable(folder, error) from None
    return problems + [f"{path}: {message}" for path, message in damage.items()]


def find_absent(folder: Path, *, part: int = 0, num_parts: int = 1) -> str | None:
    """The first thing that a file system may not show yet: the manifest, or a file that is missing or too short.

    Looks at sizes only, and into the folders first, so that a network file system gives up what it remembers of them.

    Raises:
        CheckpointUnreadableError: as for `find_problems`.
    """
    for place in (folder.parent, folder):
        _entries(place)
    try:
        manifest = CheckpointManifest.load(folder)
    except (CheckpointUnreadableError, CheckpointVersionError):
        raise
    except CheckpointError as error:
        return str(error)
    for place in {(folder / record.name).parent for record in manifest.files}:
        _entries(place)
    try:
        absent = durable.find_damage(folder, manifest.files[part::num_parts], reads_content=False, may_be_longer=True)
    except OSError as error:
        raise _unreadable(folder, error) from None
    return next((f"{path}: {message}" for path, message in absent.items()), None)


def _unreadable(folder: Path, error: OSError) -> CheckpointUnreadableError:
    return CheckpointUnreadableError(
        f"{error.filename or folder}: cannot be read: {error.strerror or error}; this is no damage: let this process "
        f"read it, or move {folder} elsewhere to do without it"
    )


def load_verified(folder: Path) -> CheckpointManifest:
    """The manifest of a checkpoint folder, all of whose files are what was written.

    Raises:
        CheckpointUnreadableError: a file cannot be read.
        CheckpointError: every file that is not.
    """
    problems = find_problems(folder)
    if problems:
        raise CheckpointError("\n".join(problems))
    return CheckpointManifest.load(folder)


def _is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())
