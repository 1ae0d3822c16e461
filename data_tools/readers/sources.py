"""Expands the inputs on a command line to sources: files, patterns, folders, lists, standard input, hub datasets.

All problems with any of them are reported together, before any work.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.own_files import VOCABULARY, identities, identity_of, is_tokenizer_folder, product_at
from data_tools.readers.chunks import Source
from data_tools.readers.compression import SUFFIXES, DamagedError
from data_tools.readers.cutting import BOM
from data_tools.readers.empty_files import is_empty
from data_tools.readers.first_look import check_source
from data_tools.readers.folders import Listing, explain, list_folder, match_pattern, root_of_pattern, sort_key
from data_tools.readers.formats import unknown_kind
from data_tools.readers.hub import PREFIX, split_name
from data_tools.readers.left_out import Aside, first_names, named_again
from data_tools.readers.names import missing, no_match
from data_tools.readers.options import Compression, Kind, ReadOptions, parse_format
from data_tools.readers.saved_folders import is_description, is_saved, saved_files
from pretrain.errors import DataError, counted

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


def expand_inputs(
    inputs: Sequence[str | Path],
    options: ReadOptions | None = None,
    *,
    tokenizer: str | None = None,
    note: Callable[[str], None] | None = None,
) -> list[Source]:
    """The sources that `inputs` name, in order, each once, without empty files.

    `tokenizer`: the run's own, which is no text. `note` (default: standard error) reports all that is left out.

    Raises:
        DataError: some are missing, not files, of an unknown kind or cannot be read, names all of them; or all are
            empty.
    """
    finder = _Finder(options or ReadOptions(), note or _print_note, identities([tokenizer] if tokenizer else []))
    for item in map(str, inputs):
        finder.add(item)
    if not finder.problems:
        finder.check_columns()
    if finder.problems:
        raise DataError("; ".join(dict.fromkeys(finder.problems)))  # several inputs may lead to one file
    if not finder.sources and finder.empty:
        verb = "is empty" if len(finder.empty) == 1 else f"all {len(finder.empty)} files are empty"
        raise DataError(f"{first_names(finder.empty)}: {verb}; give files that hold documents")
    if not finder.sources:
        raise DataError(f"{', '.join(map(str, inputs)) or 'no input'}: names no file to read")
    finder.report()
    return finder.sources


def named_files(inputs: Sequence[str]) -> list[str]:
    """The files that `inputs` name themselves, lists of files included, whether they are read or left out."""
    return [path for item in inputs if os.path.isfile(path := item if os.path.exists(item) else item.removeprefix("@"))]


def require_unchanged(sources: Sequence[Source]) -> None:
    """Raises DataError: a file was changed since `expand_inputs`; what was read of it may be neither old nor new."""
    for source in sources:
        if source.num_bytes and os.path.exists(source.path):
            status = os.stat(source.path)
            if (status.st_size, status.st_mtime_ns) != (source.num_bytes, source.mtime_ns):
                raise DataError(
                    f"{source.path}: was changed while it was read ({source.num_bytes} bytes, now {status.st_size}); "
                    "start again with --restart when nothing writes to it"
                )


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
    """Collects sources; what is left out is collected too, and reported by `report`."""

    options: ReadOptions
    note: Callable[[str], None]
    tokenizer: frozenset[tuple[int, int]]
    sources: list[Source] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    names: dict[tuple[int, int], list[str]] = field(default_factory=dict)  # of each file, by its identity

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
        """Looks at the beginning of every file, and for the text column in every table with a schema or header."""
        for source in self.sources:
            try:
                check_source(source, self.options)
            except DamagedError as error:
                if self.options.on_error == "stop":  # else it is counted when it is read
                    self.problems.append(str(error))
            except DataError as error:
                self.problems.append(str(error))

    def report(self) -> None:
        """Notes which files hold nothing, and which were named more than once."""
        if self.empty:
            number = f"{len(self.empty)} of {len(self.empty) + len(self.sources)} files"
            verb = "is empty and holds" if len(self.empty) == 1 else "are empty and hold"
            self.note(f"{number} {verb} no document: {first_names(self.empty)}")
        again = [named_again(names) for names in self.names.values() if len(names) > 1]
        if again:
            self.note(f"{first_names(again)}; a file is read once")

    def _add_standard_input(self) -> None:
        if self.options.input_format is None:
            self.problems.append("-: standard input has no name; give its kind with --input-format, such as jsonl")
        elif (kind := kind_of("-", self.options)) is None or kind[0] in _TABLES:
            self.problems.append(f"-: --input-format {self.options.input_format} cannot be read from standard input")
        elif any(source.path == "-" for source in self.sources):
            self.problems.append("-: standard input can be read once only")
        elif not _can_read_standard_input():
            self.problems.append("-: standard input is closed")
        elif not (os.path.isfile("/dev/stdin") and self._is_again("-", os.fstat(0))):  # else: the file of `< FILE`
            self.sources.append(Source("-", *kind, name="-"))

    def _add_hub_name(self, item: str) -> None:
        try:
            split_name(item)
        except DataError as error:
            self.problems.append(str(error))
        else:
            self.sources.append(Source(item, "hub", name=item))

    def _add_list(self, path: str) -> None:
        try:
            content = Path(path).read_bytes().removeprefix(BOM)
        except OSError as error:
            self.problems.append(f"@{path}: cannot be read: {error.strerror or error}")
            return
        if b"\0" in content:
            self.problems.append(f"@{path}: holds zero bytes; write one name per line, as UTF-8, without -print0")
            return
        lines = [line.strip() for line in content.splitlines()]  # of bytes: a name may hold any
        items = [os.fsdecode(line) for line in lines if line and not line.startswith(b"#")]
        if not items:
            self.problems.append(f"@{path}: names no file")
        for item in items:
            self.add(item, is_listed=True)

    def _add_pattern(self, pattern: str) -> None:
        found = match_pattern(pattern)
        if not (found.files or found.folders or found.special or found.problems):
            self.problems.append(f"{pattern}: no file matches{no_match(pattern)}")
            return
        # Where `**` comes last, folders are on the way to the files; elsewhere the pattern asks for them.
        folders = [] if pattern.endswith("**") else found.folders
        self._add_found(pattern, root_of_pattern(pattern), found.files, found, Aside(folders=folders))

    def _add_folder(self, folder: str) -> None:
        if is_tokenizer_folder(folder):
            self.problems.append(f"{folder}: is a tokenizer, not text; leave it out")
            return
        if self.options.input_format is None and is_saved(folder):
            self._add_saved(folder, folder)
            return
        is_whole = is_saved if self.options.input_format is None else lambda path: False
        found = list_folder(folder, is_whole=is_whole, is_product=is_tokenizer_folder)
        whole = set(found.whole)
        paths = sorted([*found.files, *whole], key=lambda path: sort_key(path, folder, path in whole))
        self._add_found(
            folder, folder, paths, found, Aside(products=[(path, "a tokenizer") for path in found.products]), whole
        )

    def _add_found(
        self, given: str, root: str, paths: list[str], found: Listing, aside: Aside, whole: Collection[str] = ()
    ) -> None:
        """Adds what a folder or pattern gave, and reports what of it is left out."""
        before = self._progress()
        self.problems += found.problems
        for path in paths:
            if path in whole:
                self._add_saved(path, root)
            elif kind_of(path, self.options) is None:
                aside.unknown.append(path)
            elif (product := self._product(path)) is not None:
                aside.products.append((path, product))
            else:
                self._add_file(path, os.path.relpath(path, root or os.curdir))
        aside.hidden, aside.special, aside.again = found.hidden, found.special, found.again
        for words in aside.notes(root):
            self.note(f"{given}: {words}")
        if self._progress() == before:
            self.problems.append(f"{given}: holds no file of a known kind ({_known_kinds()})")

    def _progress(self) -> tuple[int, ...]:
        return len(self.problems), sum(map(len, self.names.values()))

    def _add_saved(self, folder: str, root: str) -> None:
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
            self._add_file(path, os.path.relpath(path, root))
        others = list_folder(folder)
        self.problems += others.problems
        left_out = [path for path in others.files if path not in set(files) and not is_description(path)]
        left_out += others.special
        if left_out:
            names = [os.path.relpath(path, folder) for path in left_out]
            self.note(
                f"{folder}: is a saved dataset; left out {counted(len(names), 'other file')}: {first_names(names)}"
            )

    def _add_file(self, path: str, name: str = "") -> None:
        """Adds a file; `name` if it was found in a folder or by a pattern, and not named itself."""
        try:
            status = os.stat(path)
        except OSError as error:
            self.problems.append(explain(path, error) + (missing(path) if error.errno == errno.ENOENT else ""))
            return
        known_kind = kind_of(path, self.options)
        if not os.path.isfile(path):
            self.problems.append(f"{path}: is not a file; a pipe is read as standard input, -")
            return
        if known_kind is None:
            self.problems.append(f"{path}: {unknown_kind(path, _known_kinds())}")
            return
        if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
            self.problems.append(f"{path}: cannot be read: {os.strerror(errno.EACCES)}")
            return
        if self._is_again(path, status) or not (name or self._is_meant(path)):
            return
        source = Source(path, *known_kind, status.st_size, status.st_mtime_ns, name or os.path.basename(path))
        if is_empty(source, self.options):
            self.empty.append(path)
        else:
            self.sources.append(source)

    def _is_again(self, path: str, status: os.stat_result) -> bool:
        """Whether the file is among the inputs already, perhaps by another name; records this one."""
        names = self.names.setdefault((status.st_dev, status.st_ino), [])
        names.append(path)
        return len(names) > 1

    def _is_meant(self, path: str) -> bool:
        """Whether a file that was named is text, as far as we know; else it is a problem."""
        product = self._product(path)
        if product == VOCABULARY:  # it is text, though of a strange kind
            self.note(f"{path}: looks like a vocabulary, and is read as text")
        elif product is not None:
            self.problems.append(f"{path}: is {product}, not text; leave it out")
            return False
        return True

    def _product(self, path: str) -> str | None:
        """What `path` is, if it is the tokenizer of this run or a product of our programs, and no text."""
        try:
            if identity_of(path) in self.tokenizer:
                return "the tokenizer of this run"
            if is_description(path) and is_saved(os.path.dirname(path)):
                return "the description of a saved dataset"
            return product_at(path)
        except OSError:
            return None  # reported where it is added


def _known_kinds() -> str:
    others = [suffix for suffix, kind in KINDS.items() if kind not in _TABLES]
    return (
        f"{', '.join(others)}, each plain or with {', '.join(SUFFIXES)}, and {', '.join(sorted({*KINDS} - {*others}))}"
    )


def _can_read_standard_input() -> bool:
    """Whether descriptor 0 can be read; where a program was started without one, `run_program` opens it for writing."""
    try:
        return fcntl.fcntl(0, fcntl.F_GETFL) & os.O_ACCMODE != os.O_WRONLY
    except OSError:
        return False


def _print_note(words: str) -> None:
    sys.stderr.write(f"note: {words}\n")
