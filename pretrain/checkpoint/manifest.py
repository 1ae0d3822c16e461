"""What a checkpoint holds: its manifest, where checkpoints lie, and what differs from what was written."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
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
    """What a checkpoint holds, enough to refuse or to export it without opening a tensor."""

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
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """The text of manifest.json, with the hash of its own content under `self_xxh3_128`."""
        return durable.seal_json(asdict(self), "content")

    @classmethod
    def load(cls, folder: Path) -> CheckpointManifest:
        """Read and check `folder/manifest.json`.

        Raises:
            CheckpointError: the file is missing, damaged or of another format version.
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
            return cls(**raw)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: is missing; {folder} is no finished checkpoint") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: is damaged: {type(error).__name__}: {error}") from None


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return root / f"step-{step:07d}"


def list_checkpoints(root: Path) -> list[Path]:
    """Folders of finished checkpoints, newest first; `.tmp` and `.bad` ones are none."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _STEP_FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest under it (run folder or checkpoints/).

    Raises:
        CheckpointError: there is none.
    """
    if (path / MANIFEST).is_file():
        return path
    for root in (path / "checkpoints", path):
        if found := list_checkpoints(root):
            return found[0]
    raise CheckpointError(
        f"{path}: no checkpoint here; expected a step-NNNNNNN folder, a run folder or its checkpoints/"
    )


def find_problems(folder: Path, *, part: int = 0, num_parts: int = 1) -> list[str]:
    """What differs between a checkpoint and its manifest; checks every `num_parts`-th file, starting at `part`."""
    try:
        manifest = CheckpointManifest.load(folder)
    except CheckpointError as error:
        return [str(error)]
    share = manifest.files[part::num_parts]
    outside = [record.name for record in share if not _is_inside(folder / record.name, folder)]
    problems = [f"{folder / MANIFEST}: names a file outside the checkpoint: {name!r}" for name in outside]
    damage = durable.find_damage(folder, [record for record in share if record.name not in outside])
    return problems + [f"{path}: {message}" for path, message in damage.items()]


def load_verified(folder: Path) -> CheckpointManifest:
    """The manifest of a checkpoint folder, all of whose files are what was written.

    Raises:
        CheckpointError: every file that is not.
    """
    problems = find_problems(folder)
    if problems:
        raise CheckpointError("\n".join(problems))
    return CheckpointManifest.load(folder)


def _is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())
