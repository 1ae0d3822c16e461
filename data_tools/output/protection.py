"""Keeps other people's files: what a program is about to replace must be of its own making, and none of its inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from data_tools.own_files import (
    TOKENIZER_FILES,
    has_run,
    head_of,
    identities,
    identity_of,
    is_journal,
    is_manifest,
    is_rejects,
    is_tokenizer_folder,
)
from pretrain.data.dataset.dataset_format import MAGIC
from pretrain.data.dataset.manifest import Manifest
from pretrain.errors import DataError

_REMEDY = "choose another output prefix, or move it away"
_FILES = (".bin", ".idx", ".json", ".lock", ".journal", ".rejects.jsonl")
_WRITER_FILES = ("bin", "idx", "lengths", "documents")
_SCRATCH = ("offsets.tmp", "hashes.tmp", "marks.tmp", "rejects.jsonl.tmp", "tokenizer.tmp", "tokenizer.old")


def unfinished_files(prefix: str | Path) -> list[Path]:
    """The names under which a run on `prefix` keeps what is not finished."""
    names = [f"{raw}{name}.tmp" for raw in ("", "raw.") for name in _WRITER_FILES]
    return [Path(f"{prefix}.{name}") for name in (*names, *_SCRATCH)]


def dataset_files(prefix: str) -> list[Path]:
    """All files that a run on `prefix` may write, finished or not."""
    folder = Path(f"{prefix}.tokenizer")
    return [*(Path(f"{prefix}{name}") for name in _FILES), folder, *map(folder.joinpath, sorted(TOKENIZER_FILES)),
            *unfinished_files(prefix)]  # fmt: skip


def refuse_inputs(
    outputs: Iterable[Path], inputs: Sequence[str | Path], *, what: str = "an input", remedy: str = "output prefix"
) -> None:
    """Raises DataError: one of `outputs` is one of `inputs`, by whatever name; `-` is the file of standard input.

    `what` the inputs are, and what the user should choose another of, are words for the message.
    """
    taken = identities("/dev/stdin" if item == "-" else item for item in inputs)
    for path in outputs:
        if os.path.exists(path) and identity_of(path) in taken:
            raise DataError(f"{path}: is {what}, and would be replaced; choose another {remedy}")


def refuse_foreign(prefix: str) -> None:
    """Raises DataError: a file or folder at one of the names of a dataset was not made by these programs."""
    _check_tokenizer(prefix)
    _check(Path(f"{prefix}.rejects.jsonl"), is_rejects)
    _check(Path(f"{prefix}.journal"), is_journal)
    index, manifest = Path(f"{prefix}.idx"), Path(f"{prefix}.json")
    _check(index, lambda data: data.startswith(MAGIC))
    _check(manifest, is_manifest)
    # Token ids cannot be recognised by themselves.
    if not (index.exists() or manifest.exists() or has_run(prefix)):
        _check(Path(f"{prefix}.bin"), lambda data: False)


def refuse_foreign_temporaries(prefix: str) -> None:
    """Raises DataError: files have the names of unfinished ones, though no run on `prefix` left a lock or a journal."""
    if not has_run(prefix):
        for path in unfinished_files(prefix):
            if os.path.lexists(path):
                raise in_the_way(path)


def in_the_way(path: Path, remedy: str = _REMEDY) -> DataError:
    """The error for a file that is not ours to replace."""
    return DataError(f"{path}: is in the way and not of our making; {remedy}")


def _check(path: Path, is_ours: Callable[[bytes], bool]) -> None:
    """Raises DataError: `path` exists, is not empty, and is not ours."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise in_the_way(path)
    try:
        data = head_of(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise DataError(f"{path}: is in the way and cannot be read: {error.strerror}; {_REMEDY}") from None
    if data and not is_ours(data):
        raise in_the_way(path)


def _check_tokenizer(prefix: str) -> None:
    folder = Path(f"{prefix}.tokenizer")
    if not os.path.lexists(folder):
        return
    if not is_tokenizer_folder(folder):
        raise in_the_way(folder)
    known = set(TOKENIZER_FILES)
    with suppress(DataError):  # a release that wrote others recorded their names
        known |= {record.name for record in Manifest.load(Path(f"{prefix}.json")).tokenizer_files}
    foreign = sorted(set(os.listdir(folder)) - known)
    if foreign:
        raise in_the_way(folder / foreign[0])
