"""The folder that an export is written to: what is in it, and how one export takes the place of another.

An export owns the files that it wrote, and no others: its record, taco_export.json, lists them with their hashes. A new
folder is filled under another name and renamed. In a folder that exists, which may be the current one, a mount point or
hold files of the user, the files are exchanged one by one:

    OUT/.taco-export/new/    the new export, complete; its record is moved last
    OUT/.taco-export/old/    the earlier export's files, moved here before

A kill in between leaves `.taco-export`, and the next export first takes back what was moved.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain import durable
from pretrain.checkpoint.manifest import MANIFEST
from pretrain.durable import FileRecord
from pretrain.errors import DataError

EXPORT_RECORD = "taco_export.json"
CARD, CARD_BESIDE = "README.md", "README.export.md"
_WORK = ".taco-export"
# What releases wrote whose records list no files.
_EARLIER_NAMES = frozenset({
    CARD, "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "taco_tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "sentencepiece.model",
    "spiece.model", "source.json",
})  # fmt: skip


@dataclass(frozen=True)
class Earlier:
    """An earlier export in the folder.

    Attributes:
        record: its taco_export.json; None if that is damaged.
        names: the files that it wrote and that are there, without the record.
        is_card_edited: whether its card is no longer what it wrote.
    """

    record: dict[str, Any] | None
    names: frozenset[str]
    is_card_edited: bool

    def find_damage(self, folder: Path) -> list[str] | None:
        """What differs from what was written, the card aside; None if the record lists no files."""
        files = _file_records(self.record)
        if files is None:
            return None
        damage = durable.find_damage(folder, [record for record in files if record.name != CARD])
        return [f"{path.name} {message}" for path, message in damage.items()]


class Target:
    """The folder `out`; links are followed, so that an export goes to where they lead."""

    def __init__(self, out: Path, checkpoint: Path) -> None:
        """Looks at `out` and takes back what a killed export had moved.

        Raises:
            DataError: it is a file, lies in a checkpoint, holds something that is no export, or cannot be used.
        """
        self.named = out
        self.path = Path(os.path.realpath(out))
        self.earlier: Earlier | None = None
        try:
            self._refuse_wrong_place(Path(os.path.realpath(checkpoint)))
            if self.path.is_dir():
                _take_back(self.path)
                self.earlier = self._find_earlier()
        except OSError as error:
            raise self.unwritable(error) from None

    def unwritable(self, error: object) -> DataError:
        """The error for a folder that cannot be used."""
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        return DataError(
            f"{self.named}: cannot be written: {reason}; free space, mend its permissions or choose another folder"
        )

    @property
    def work(self) -> Path:
        """The new folder to fill: beside the target, or inside it if the target exists."""
        if self.path.is_dir():
            return self.path / _WORK / "new"
        return self.path.with_name(f".{self.path.name}.tmp")

    def prepare(self) -> Path:
        """Make `work` empty. Raises OSError."""
        self.discard()
        self.work.mkdir(parents=True)
        return self.work

    def discard(self) -> None:
        """Remove what `prepare` made."""
        shutil.rmtree(self.path / _WORK if self.path.is_dir() else self.work, ignore_errors=True)

    @property
    def card_name(self) -> str:
        """The name of the new card: an edited one keeps its place."""
        return CARD_BESIDE if self.earlier is not None and self.earlier.is_card_edited else CARD

    def publish(self) -> None:
        """Put the finished `work` in place; after a failure the earlier export is there as before.

        Raises:
            DataError: a file of somebody else has the name of a new one.
            OSError: the disk refuses.
        """
        work = self.work
        if not self.path.is_dir():
            durable.sync_folder(work)
            work.rename(self.path)
            durable.sync_folder(self.path.parent)
            return
        kept = {CARD} if self.card_name != CARD else set()
        owned = (self.earlier.names if self.earlier is not None else frozenset()) - kept
        strangers = sorted(path.name for path in work.iterdir() if (self.path / path.name).exists())
        strangers = [name for name in strangers if name not in owned | {EXPORT_RECORD}]
        if strangers:
            raise DataError(
                f"{self.named}: {strangers[0]} is in the way and not of the earlier export; move it elsewhere"
            )
        try:
            _exchange(self.path, sorted(owned))
        except OSError:
            _take_back(self.path)
            raise
        durable.sync_folder(self.path)

    def _refuse_wrong_place(self, checkpoint: Path) -> None:
        if self.named.is_symlink() and not self.named.exists():  # as where a disk is not mounted
            raise DataError(
                f"{self.named}: is a link to {self.path}, which is not there; mount or make that, or name a folder"
            )
        if self.path.exists() and not self.path.is_dir():
            raise DataError(f"{self.named}: is a file; name a folder")
        if any(_is_checkpoint(folder) for folder in (self.path, *self.path.parents)):
            raise DataError(f"{self.named}: lies in a checkpoint, which an export would damage; choose another folder")
        siblings = {checkpoint.parent, *(path for path in self.path.parents if path.name == "checkpoints")}
        if self.path.parent in siblings and re.match(r"step-\d", self.path.name):
            raise DataError(f"{self.named}: would look like a checkpoint of the run; choose another folder")

    def _find_earlier(self) -> Earlier | None:
        names = {entry.name for entry in self.path.iterdir()}
        if not names:
            return None
        if EXPORT_RECORD not in names:
            some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise DataError(f"{self.named}: exists and is no export: it holds {some}; name an empty or a new folder")
        record = _read_record(self.path)
        card = self.path / CARD
        is_edited = card.is_file() and _is_edited(card, record)
        return Earlier(record, frozenset(_owned_names(record) & names), is_edited)


def _is_checkpoint(folder: Path) -> bool:
    parts = (folder / "state", folder / "weights.safetensors")
    return (folder / MANIFEST).is_file() and any(part.exists() for part in parts)


def _read_record(folder: Path) -> dict[str, Any] | None:
    """The record of the export in `folder`; None if it is damaged."""
    try:
        record = json.loads((folder / EXPORT_RECORD).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{folder / EXPORT_RECORD}: cannot be read: {error.strerror or error}") from None
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"manifest_sha256", "step"} <= record.keys() else None


def _file_records(record: Mapping[str, Any] | None) -> list[FileRecord] | None:
    """The files that a record lists; None if it lists none that can be read, as those of earlier releases."""
    try:
        files = [FileRecord(**fields) for fields in (record or {})["files"]]
    except (KeyError, TypeError):
        return None
    # A name that leads elsewhere comes from no export.
    return files if all(isinstance(file.name, str) and Path(file.name).name == file.name for file in files) else None


def _owned_names(record: Mapping[str, Any] | None) -> set[str]:
    files = _file_records(record)
    return set(_EARLIER_NAMES) if files is None else {file.name for file in files}


def _is_edited(card: Path, record: Mapping[str, Any] | None) -> bool:
    files = _file_records(record)
    if files is not None:
        written = [file for file in files if file.name == CARD]
        return not written or bool(durable.find_damage(card.parent, written))
    text = card.read_text(encoding="utf-8", errors="replace")  # of an earlier release: no hash, so by its look
    return not (text.startswith("---\nlibrary_name: transformers\n") and text.endswith('from_pretrained(".")\n```\n'))


def _exchange(folder: Path, owned: list[str]) -> None:
    """Move the earlier export's files away and the new ones in; the records show how far that came.

    config.json goes early and comes late: without it nobody loads a mixture of both.
    """
    new, old = folder / _WORK / "new", folder / _WORK / "old"
    order = [EXPORT_RECORD, "config.json"]
    old.mkdir()
    for name in (*order, *(name for name in owned if name not in order)):
        if name in {EXPORT_RECORD, *owned} and (folder / name).exists():
            (folder / name).rename(old / name)
    for name in (*(path.name for path in new.iterdir() if path.name not in order), *reversed(order)):
        (new / name).rename(folder / name)
    with suppress(OSError):  # the new export is there; the next one removes what is left
        shutil.rmtree(folder / _WORK)


def _take_back(folder: Path) -> None:
    """Undo an exchange that did not come to its end; may itself be killed and called again."""
    new, old = folder / _WORK / "new", folder / _WORK / "old"
    if old.is_dir() and (new / EXPORT_RECORD).exists():  # the new record is moved last
        before = old if (old / EXPORT_RECORD).exists() else folder
        had = _owned_names(_read_record(before)) if (before / EXPORT_RECORD).exists() else set()
        for name in _owned_names(_read_record(new)):
            if not (new / name).exists() and name not in had:
                (folder / name).unlink(missing_ok=True)
        for path in sorted(old.iterdir(), key=lambda path: path.name == EXPORT_RECORD):
            path.replace(folder / path.name)
    shutil.rmtree(folder / _WORK, ignore_errors=True)
