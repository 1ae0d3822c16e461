"""Expands the inputs on a command line to sources: files, patterns, folders, lists, standard input, hub datasets.

All problems with any of them are reported together, before any work.
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.readers.arrow_files import check_arrow
from data_tools.readers.chunks import Source
from data_tools.readers.compression import SUFFIXES, DamagedError
from data_tools.readers.hub import PREFIX, split_name
from data_tools.readers.options import Compression, Kind, ReadOptions, parse_format
from data_tools.readers.parquet_files import check_parquet
from data_tools.readers.saved_folders import is_saved, saved_files
from pretrain.errors import DataError

KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "txt",
    ".csv": "csv",
    ".tsv": "tsv",
    ".wet": "wet",
    ".warc": "wet",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_TABLES = ("parquet", "arrow")
_NAMED = 5


def expand_inputs(
    inputs: Sequence[str | Path], options: ReadOptions | None = None, *, note: Callable[[str], None] | None = None
) -> list[Source]:
    """The sources that `inputs` name, in order; `note` (default: standard error) reports other files in folders.

    Raises:
        DataError: some are missing, empty, not files, or of an unknown kind; names all of them.
    """
    finder = _Finder(options or ReadOptions(), note or _print_note)
    for item in map(str, inputs):
        finder.add(item)
    if not finder.problems:
        finder.check_columns()
    if finder.problems:
        raise DataError("; ".join(finder.problems))
    if not finder.sources:
        raise DataError(f"{', '.join(map(str, inputs)) or 'no input'}: names no file to read")
    return finder.sources


def kind_of(path: str, options: ReadOptions) -> tuple[Kind, Compression] | None:
    """Kind and compression by a file's name, or by --input-format; None if unknown."""
    stem, suffix = os.path.splitext(path)
    by_name: Compression = SUFFIXES.get(suffix.lower(), "")
    if options.input_format is not None:
        kind, compression = parse_format(options.input_format)
        compression = by_name if compression is None else compression
    else:
        name = stem if by_name else path
        kind_by_name = KINDS.get(os.path.splitext(name)[1].lower())
        if kind_by_name is None:
            return None
        kind, compression = kind_by_name, by_name
    return None if kind in _TABLES and compression else (kind, compression)


@dataclass
class _Finder:
    options: ReadOptions
    note: Callable[[str], None]
    sources: list[Source] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, item: str, *, is_listed: bool = False) -> None:
        if item == "-" and not is_listed:
            self._add_standard_input()
        elif item.startswith(PREFIX):
            self._add_hub_name(item)
        elif item.startswith("@") and not is_listed and not os.path.exists(item):
            self._add_list(item[1:])
        elif os.path.isdir(item):
            self._add_folder(item)
        elif glob.has_magic(item) and not os.path.exists(item):
            self._add_pattern(item)
        else:
            self._add_file(item)

    def check_columns(self) -> None:
        """Looks for the text column in every table whose file has a schema."""
        for source in self.sources:
            check = {"parquet": check_parquet, "arrow": check_arrow}.get(source.kind)
            try:
                if check is not None:
                    check(source.path, self.options.json_key)
            except DamagedError as error:
                if self.options.on_error == "stop":  # else it is counted when it is read
                    self.problems.append(str(error))
            except DataError as error:
                self.problems.append(str(error))

    def _add_standard_input(self) -> None:
        if self.options.input_format is None:
            self.problems.append("-: standard input has no name; give its kind with --input-format, such as jsonl")
        elif (kind := kind_of("-", self.options)) is None or kind[0] in _TABLES:
            self.problems.append(f"-: --input-format {self.options.input_format} cannot be read from standard input")
        elif any(source.path == "-" for source in self.sources):
            self.problems.append("-: standard input can be read once only")
        else:
            self.sources.append(Source("-", *kind))

    def _add_hub_name(self, item: str) -> None:
        try:
            split_name(item)
        except DataError as error:
            self.problems.append(str(error))
        else:
            self.sources.append(Source(item, "hub"))

    def _add_list(self, path: str) -> None:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            self.problems.append(f"@{path}: cannot be read: {getattr(error, 'strerror', None) or error}")
            return
        items = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not items:
            self.problems.append(f"@{path}: names no file")
        for item in items:
            self.add(item, is_listed=True)

    def _add_pattern(self, pattern: str) -> None:
        paths = sorted(glob.glob(pattern, recursive=True))
        if not paths:
            self.problems.append(f"{pattern}: no file matches")
        for path in paths:
            if os.path.isfile(path):
                self._add_file(path)

    def _add_folder(self, folder: str) -> None:
        if self.options.input_format is None and is_saved(folder):
            self._add_saved(folder)
            return
        before, left_out = (len(self.sources), len(self.problems)), []
        for path in _files_under(folder):
            if path.endswith(os.sep):
                self._add_saved(path)
            elif kind_of(path, self.options) is None:
                left_out.append(path)
            else:
                self._add_file(path)
        if (len(self.sources), len(self.problems)) == before:
            self.problems.append(f"{folder}: holds no file of a known kind ({_known_kinds()})")
        if left_out:
            named = ", ".join(os.path.relpath(path, folder) for path in left_out[:_NAMED])
            more = ", ..." if len(left_out) > _NAMED else ""
            self.note(f"{folder}: left out {len(left_out)} files of unknown kind: {named}{more}")

    def _add_saved(self, folder: str) -> None:
        try:
            files, splits = saved_files(folder)
        except DataError as error:
            self.problems.append(str(error))
            return
        if len(splits) > 1:
            self.note(
                f"{folder}: reads all splits, {', '.join(splits)}; give {os.path.join(folder, splits[0])} for one"
            )
        for path in files:
            self._add_file(path)

    def _add_file(self, path: str) -> None:
        try:
            status = os.stat(path)
        except OSError as error:
            self.problems.append(f"{path}: {error.strerror}")
            return
        known_kind = kind_of(path, self.options)
        if not os.path.isfile(path):
            self.problems.append(f"{path}: is not a file; a pipe is read as standard input, -")
        elif status.st_size == 0:
            self.problems.append(f"{path}: is empty (0 bytes)")
        elif known_kind is None:
            self.problems.append(f"{path}: unknown kind; known are {_known_kinds()}; or give it with --input-format")
        else:
            self.sources.append(Source(path, *known_kind, status.st_size, status.st_mtime_ns))


def _files_under(folder: str) -> Iterator[str]:
    """All files in `folder` and below, sorted, without hidden ones; saved datasets as folders with a trailing slash."""
    for parent, folders, names in os.walk(folder):
        if parent != folder and is_saved(parent):
            folders.clear()
            yield os.path.join(parent, "")
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield os.path.join(parent, name)


def _known_kinds() -> str:
    others = [suffix for suffix, kind in KINDS.items() if kind not in _TABLES]
    return (
        f"{', '.join(others)}, each plain or with {', '.join(SUFFIXES)}, and {', '.join(sorted({*KINDS} - {*others}))}"
    )


def _print_note(words: str) -> None:
    sys.stderr.write(f"note: {words}\n")
