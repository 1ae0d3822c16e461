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
      step-0003000.bad/      failed its verification: set aside, and taken back by a later start if it verifies there

All ranks write into the `.tmp` folder and fsync; rank 0 writes the manifest and renames. A folder without `.tmp` is
therefore complete, and its manifest shows whether it still holds what was written.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain import durable
from pretrain.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    CheckpointUnreadableError,
    CheckpointVersionError,
    find_absent,
    find_problems,
    list_checkpoints,
    list_set_aside,
    step_folder,
    step_named,
)
from pretrain.checkpoint.run_record import is_own
from pretrain.durable import FileRecord
from pretrain.errors import CheckpointError
from pretrain.parallel import collectives
from pretrain.runlog import get_logger

if TYPE_CHECKING:
    import torch.distributed as distributed


log = get_logger(__name__)

# Seconds between looks at files that a network file system may not show yet; one start waits them once, not per file.
WAITS = (0.2, 0.4, 0.8, 1.6, 2.0)


class NoGoodCheckpointError(CheckpointError):
    """There are checkpoints, but all of them are damaged: a person must decide whether to begin again."""


class CheckpointStore:
    """The checkpoints of one run; all ranks call every method together.

    Args:
        group: the group in which ranks vote; a separate one if saves run in a thread beside training.
        run_id: the run's own name; its checkpoints and those without a name are its own, and no other is removed.
        on_commit: called on rank 0 with the step of every checkpoint once it is committed; may raise OSError.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep: int,
        keep_every: int | None = None,
        group: distributed.ProcessGroup | None = None,
        run_id: str = "",
        on_commit: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.root = root
        self.keep = keep
        self.keep_every = keep_every
        self.run_id = run_id
        self._group = group
        self._on_commit = on_commit
        self._waits = list(WAITS)

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

        One that an earlier start set aside and that verifies now gets its name back. With `every_steps`, for a return
        within a run, only the run's own count: those at multiples of it, if there are any.

        Raises:
            NoGoodCheckpointError: none is good.
            CheckpointUnreadableError: a file cannot be read on some rank; nothing is set aside because of that.
            CheckpointError: a bad one cannot be set aside, or one belongs to another release.
        """
        problems = []
        for folder in self._candidates(every_steps):
            was_bad = folder.suffix == ".bad"
            failure = self._look_again(folder) if was_bad else self._examine(folder)
            if failure is None:
                return self._take_back(folder) if was_bad else folder
            problems.append(failure)
            if not was_bad:
                log.warning("checkpoint %s is not used: %s", folder.name, failure)
                self._on_rank_0(lambda folder=folder: _set_aside(folder), f"{folder}: cannot be set aside")  # type: ignore[misc]
        if problems:
            reasons = "\n  ".join(problems)
            raise NoGoodCheckpointError(
                f"{self.root}: no checkpoint is good; they are kept as *.bad. Restore one, or train from step 0 with "
                f"--from-scratch\n  {reasons}"
            )
        return None

    def wait_for(self, step: int) -> bool:
        """Wait some seconds for the checkpoint of `step`, which the run says to have saved; whether it is there."""
        folder = step_folder(self.root, step)
        while step not in map(step_named, self._candidates(None)):
            if not self._pause(f"{folder}: is recorded as saved, but not there yet"):
                return False
        return True

    def _candidates(self, every_steps: int | None) -> list[Path]:
        """What may be loaded, newest first. Rank 0's listing: other nodes may see an older state of a shared folder."""
        found: list[Path] = []
        problem = None
        if collectives.rank() == 0:
            try:
                found = list_checkpoints(self.root)
                if every_steps is not None:
                    found = [folder for folder in found if is_own(folder, self.run_id)]
                    found = [folder for folder in found if step_named(folder) % every_steps == 0] or found
                else:
                    found = sorted(found + list_set_aside(self.root), key=_newest_and_plain_first)
            except CheckpointUnreadableError as error:
                problem = str(error)
        found, problem = collectives.gather_objects((found, problem), self._group)[0]
        if problem is not None:
            raise CheckpointUnreadableError(problem)
        return found

    def _examine(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint, the same on all ranks, once its files have had time to appear."""
        rank, num_ranks = collectives.rank(), collectives.world_size()
        while absent := vote(lambda: find_absent(folder, part=rank, num_parts=num_ranks), self._group):
            if not self._pause(absent):
                break
        return find_damage_together(folder, self._group)

    def _look_again(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint that was set aside; that it cannot be read is then no reason to stop."""
        try:
            failure = find_damage_together(folder, self._group)
        except CheckpointError as error:
            failure = str(error)
        return failure and f"{folder}: was set aside by an earlier start ({failure})"

    def _pause(self, reason: str) -> bool:
        """Wait a little for a network file system; False if this start has waited enough. The same on all ranks."""
        if not self._waits:
            return False
        if len(self._waits) == len(WAITS):
            log.warning("waiting up to %.0f s for the file system: %s", sum(self._waits), reason)
        time.sleep(self._waits.pop(0))
        return True

    def _take_back(self, folder: Path) -> Path:
        final = step_folder(self.root, step_named(folder))
        self._on_rank_0(lambda: _rename_durably(folder, final), f"{folder}: cannot be renamed")
        log.warning("checkpoint %s verifies, and is used again as %s", folder.name, final.name)
        return final

    def _prepare(self) -> None:
        if self.root.is_symlink() and not self.root.exists():
            target = self.root.readlink()
            raise CheckpointError(f"it is a link to {target}, which is not there; mount that, or remove the link")
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
            if is_own(final, self.run_id):
                final.rename(old)
            else:
                log.warning("%s: is damaged or of another run, and is set aside", final)
                _set_aside(final)
        temporary.rename(final)
        durable.sync_folder(self.root)
        shutil.rmtree(old, ignore_errors=True)
        try:
            self._on_commit(manifest.step)
            durable.write_text(self.root / "latest", final.name + "\n")
            self._prune(manifest.step)
        except (OSError, CheckpointUnreadableError) as error:
            # The checkpoint is complete; neither a record or a hint nor an old copy is worth the run.
            log.warning("%s: is saved, but `latest` or an old checkpoint was not updated: %s", final, error)

    def _discard(self, temporary: Path) -> None:
        self._on_rank_0(lambda: shutil.rmtree(temporary, ignore_errors=True), "")

    def _prune(self, step: int) -> None:
        """Remove old checkpoints of this run; those of others, and any beyond `step`, neither count nor go."""
        older = [folder for folder in list_checkpoints(self.root) if step_named(folder) <= step]
        own = [folder for folder in older if is_own(folder, self.run_id)]
        for folder in superfluous(own, self.keep, self.keep_every):
            remove_checkpoint(folder)

    def _on_rank_0(self, action: Callable[[], None], complaint: str) -> None:
        """Run `action` on rank 0; every rank waits for it and raises if it failed."""
        problem = None
        if collectives.rank() == 0:
            try:
                action()
            except (OSError, CheckpointError) as error:
                problem = str(error)
        failure = collectives.first_failure(problem, self._group)
        if failure is not None:
            raise CheckpointError(f"{complaint}: {failure}")


def find_damage_together(folder: Path, group: distributed.ProcessGroup | None = None) -> str | None:
    """The first problem in the files, the same on all ranks: each checks its share of the files; collective.

    Raises:
        CheckpointVersionError, CheckpointUnreadableError: on all ranks, if it is so on any.
    """
    rank, num_ranks = collectives.rank(), collectives.world_size()

    def first_problem() -> str | None:
        problems = find_problems(folder, part=rank, num_parts=num_ranks)
        return problems[0] if problems else None

    return vote(first_problem, group)


def vote(look: Callable[[], str | None], group: distributed.ProcessGroup | None = None) -> str | None:
    """The first answer of any rank's `look` that is not None, the same on all ranks; collective.

    Raises:
        CheckpointVersionError, CheckpointUnreadableError: on all ranks, if `look` raises it on any.
    """
    answer: str | None = None
    raised: str | None = None
    is_other_release = False
    try:
        answer = look()
    except (CheckpointVersionError, CheckpointUnreadableError) as error:
        raised, is_other_release = str(error), isinstance(error, CheckpointVersionError)
    answers = collectives.gather_objects((answer, raised, is_other_release), group)
    for rank, (_, message, is_other) in enumerate(answers):
        if message is not None:
            kind = CheckpointVersionError if is_other else CheckpointUnreadableError
            raise kind(message if rank == 0 else f"rank {rank}: {message}")
    return next((f"rank {rank}: {text}" for rank, (text, _, _) in enumerate(answers) if text is not None), None)


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
    return [path for path in newest_first[keep:] if keep_every is None or step_named(path) % keep_every]


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint; a kill in the middle never leaves a folder that looks finished."""
    doomed = folder.with_name(folder.name + ".tmp")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _newest_and_plain_first(folder: Path) -> tuple[int, bool, str]:
    return -step_named(folder), folder.suffix == ".bad", folder.name


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _set_aside(folder: Path) -> None:
    numbers = itertools.chain([""], (f".{count}" for count in itertools.count(2)))
    names = (folder.with_name(f"{folder.name}{number}.bad") for number in numbers)
    _rename_durably(folder, next(name for name in names if not name.exists()))


def _rename_durably(folder: Path, name: Path) -> None:
    folder.rename(name)
    durable.sync_folder(name.parent)


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
