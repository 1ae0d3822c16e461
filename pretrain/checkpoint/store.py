"""The commit protocol of checkpoints: save, verify, fall back, prune.

    checkpoints/
      latest                 name of the newest checkpoint, replaced last (a hint for people; loading does not need it)
      step-0001000/
        manifest.json        what this is, name, size and hash of every other file, and its own hash; written last
        config.yaml          resolved configuration of the run
        tokenizer/           what an export needs
        state/               see state_files.py: one file per rank that wrote (kind "training")
        weights.safetensors  full fp32 weights                    (kind "weights", from taco import-hf)
      step-0002000.tmp/      a save that did not finish: ignored, removed at the next start
      step-0003000.bad/      failed its verification: set aside, never loaded

All ranks write into the `.tmp` folder and fsync; rank 0 writes the manifest and renames. A folder without `.tmp` is
therefore complete, and its manifest shows whether it still holds what was written.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain import durable
from pretrain.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    CheckpointVersionError,
    find_problems,
    list_checkpoints,
    step_folder,
)
from pretrain.durable import FileRecord
from pretrain.errors import CheckpointError
from pretrain.parallel import collectives
from pretrain.runlog import get_logger

if TYPE_CHECKING:
    import torch.distributed as distributed


log = get_logger(__name__)


class NoGoodCheckpointError(CheckpointError):
    """There are checkpoints, but all of them are damaged: a person must decide whether to begin again."""


class CheckpointStore:
    """The checkpoints of one run; all ranks call every method together.

    Args:
        group: the group in which ranks vote; a separate one if saves run in a thread beside training.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep: int,
        keep_every: int | None = None,
        group: distributed.ProcessGroup | None = None,
    ) -> None:
        self.root = root
        self.keep = keep
        self.keep_every = keep_every
        self._group = group

    def prepare(self) -> None:
        """Make the folder and remove the leftovers of an interrupted save.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        self._on_rank_0(self._prepare, f"{self.root}: cannot be prepared")

    def save(
        self, manifest: CheckpointManifest, write_state: Callable[[Path], list[FileRecord]], extra: Iterable[Path] = ()
    ) -> Path:
        """Write, hash, commit and prune; on any error the older checkpoints are untouched and every rank raises it.

        Args:
            write_state: writes this rank's files into the folder and returns their records.
            extra: small files and folders that rank 0 copies in.

        Raises:
            CheckpointError: the first problem of any rank.
        """
        final = step_folder(self.root, manifest.step)
        temporary = final.with_name(final.name + ".tmp")
        self._on_rank_0(lambda: _make_empty(temporary), f"{temporary}: cannot be made")
        records: list[FileRecord] = []
        problem = None
        try:
            records = write_state(temporary)
        except OSError as error:
            problem = str(error)
        failure = collectives.first_failure(problem, self._group)
        if failure is not None:
            self._discard(temporary)
            raise CheckpointError(f"{final}: not saved, earlier checkpoints are untouched: {failure}")
        files = [record for share in collectives.gather_objects(records, self._group) for record in share]
        try:
            self._on_rank_0(lambda: self._commit(temporary, final, manifest, files, extra), f"{final}: not saved")
        except CheckpointError:
            self._discard(temporary)
            raise
        return final

    def newest_good(self, every_steps: int | None = None) -> Path | None:
        """The newest checkpoint that verifies on all ranks; bad ones are renamed `.bad` with a warning.

        With `every_steps`, only those at multiples of it count, if there are any.

        Raises:
            NoGoodCheckpointError: none is good, or all were set aside by an earlier start.
            CheckpointError: a bad one cannot be set aside, or one belongs to another release.
        """
        # Rank 0's listing: ranks on other nodes may see an older state of a shared folder.
        listing = (list_checkpoints(self.root), sorted(self.root.glob("step-*.bad")))
        checkpoints, set_aside = collectives.gather_objects(listing, self._group)[0]
        if every_steps is not None:
            checkpoints = [folder for folder in checkpoints if _step_of(folder) % every_steps == 0] or checkpoints
        problems = [f"{folder}: was set aside by an earlier start" for folder in set_aside]
        for folder in checkpoints:
            self._refuse_other_release(folder)
            failure = find_damage_together(folder, self._group)
            if failure is None:
                return folder
            log.warning("checkpoint %s is not used: %s", folder.name, failure)
            problems.append(failure)
            self._on_rank_0(lambda folder=folder: _set_aside(folder), f"{folder}: cannot be set aside")  # type: ignore[misc]
        if problems:
            reasons = "\n  ".join(problems)
            raise NoGoodCheckpointError(
                f"{self.root}: no checkpoint is good; they are kept as *.bad. Restore one, or train from step 0 with "
                f"--from-scratch\n  {reasons}"
            )
        return None

    def _refuse_other_release(self, folder: Path) -> None:
        problem = None
        try:
            CheckpointManifest.load(folder)
        except CheckpointVersionError as error:
            problem = str(error)
        except CheckpointError:
            pass  # damage is found, voted on and set aside by the caller
        failure = collectives.first_failure(problem, self._group)
        if failure is not None:
            raise CheckpointVersionError(failure)

    def _prepare(self) -> None:
        durable.make_folders(self.root)
        for replaced in self.root.glob("step-*.old.tmp"):  # killed between the two renames of `_commit`
            final = replaced.with_name(replaced.name.removesuffix(".old.tmp"))
            if not final.exists():
                replaced.rename(final)
        for left_over in self.root.glob("step-*.tmp"):
            shutil.rmtree(left_over)
        for left_over in self.root.glob(".latest.*.tmp"):
            left_over.unlink()

    def _commit(
        self,
        temporary: Path,
        final: Path,
        manifest: CheckpointManifest,
        files: list[FileRecord],
        extra: Iterable[Path],
    ) -> None:
        files = files + [record for path in extra for record in _copy_into(path, temporary)]
        complete = replace(manifest, files=tuple(sorted(files, key=lambda record: record.name)))
        durable.write_text(temporary / MANIFEST, complete.to_json())
        for folder in {(temporary / record.name).parent for record in files} | {temporary}:
            durable.sync_folder(folder)
        # A run that resumed from an older step saves this step again. The state is the same, so the old copy may go,
        # but only after the new one is in its place, and under a name that never looks finished.
        old = final.with_name(final.name + ".old.tmp")
        if final.exists():
            final.rename(old)
        temporary.rename(final)
        durable.sync_folder(self.root)
        shutil.rmtree(old, ignore_errors=True)
        try:
            durable.write_text(self.root / "latest", final.name + "\n")
            self._prune()
        except OSError as error:  # the checkpoint is complete; neither a hint nor an old copy is worth the run
            log.warning("%s: is saved, but `latest` or an old checkpoint was not updated: %s", final, error)

    def _discard(self, temporary: Path) -> None:
        self._on_rank_0(lambda: shutil.rmtree(temporary, ignore_errors=True), "")

    def _prune(self) -> None:
        for folder in superfluous(list_checkpoints(self.root), self.keep, self.keep_every):
            remove_checkpoint(folder)

    def _on_rank_0(self, action: Callable[[], None], complaint: str) -> None:
        """Run `action` on rank 0; every rank waits for it and raises if it failed."""
        problem = None
        if collectives.rank() == 0:
            try:
                action()
            except OSError as error:
                problem = str(error)
        failure = collectives.first_failure(problem, self._group)
        if failure is not None:
            raise CheckpointError(f"{complaint}: {failure}")


def find_damage_together(folder: Path, group: distributed.ProcessGroup | None = None) -> str | None:
    """The first problem in the files, the same on all ranks: each checks its share of the files; collective."""
    problems = find_problems(folder, part=collectives.rank(), num_parts=collectives.world_size())
    return collectives.first_failure(problems[0] if problems else None, group)


def verify_together(folder: Path) -> None:
    """Refuse a checkpoint folder that does not hold what was written, on all ranks; collective.

    Raises:
        CheckpointError: with the first problem of any rank.
    """
    damage = find_damage_together(folder)
    if damage is not None:
        raise CheckpointError(damage)


def superfluous(newest_first: list[Path], keep: int, keep_every: int | None) -> list[Path]:
    """The checkpoints beyond the `keep` newest whose step is not a multiple of `keep_every`."""
    return [path for path in newest_first[keep:] if keep_every is None or _step_of(path) % keep_every]


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint; a kill in the middle never leaves a folder that looks finished."""
    doomed = folder.with_name(folder.name + ".tmp")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _set_aside(folder: Path) -> None:
    bad = folder.with_name(folder.name + ".bad")
    if bad.exists():
        shutil.rmtree(bad)
    folder.rename(bad)


def _copy_into(source: Path, folder: Path) -> list[FileRecord]:
    """Copy a file, or a folder of files, durably; records of what was copied."""
    pairs = [(source, folder / source.name)]
    if source.is_dir():
        pairs = [(path, folder / source.name / path.name) for path in sorted(source.iterdir()) if path.is_file()]
    for original, copy in pairs:
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(original, copy)
        durable.sync_file(copy)
    return [durable.record_of(copy, folder) for _, copy in pairs]
