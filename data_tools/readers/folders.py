"""The files below a folder, or that match a pattern: every one once, with what is left aside and what cannot be read.

Symbolic links are followed. A folder is visited once, whatever links lead to it, so circles of links end; the path
without links is preferred.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

_MAGIC_IN_BRACKETS = re.compile(r"\[([*?[])\]")


@dataclass
class Listing:
    """What is below a folder. Paths begin with the folder's, and are in order: files, then subfolders, by name.

    `whole`: folders that were not entered because they are one source. `products`: folders of tokenizers. `special`:
    pipes, sockets and devices. `again`: folders left out as another name, given second, of a folder that is read.
    `problems`: folders and links that cannot be read.
    """

    files: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    products: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    special: list[str] = field(default_factory=list)
    again: list[tuple[str, str]] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def list_folder(
    root: str,
    *,
    is_whole: Callable[[str], bool] = lambda folder: False,
    is_product: Callable[[str], bool] = lambda folder: False,
) -> Listing:
    """Everything below `root`; folders for which a function is true are not entered."""
    found = Listing()
    visited: dict[tuple[int, int], str] = {}
    waiting = deque([root])
    links: deque[str] = deque()
    while waiting or links:
        # Links come last: a folder is then read under its own name, if that is below the root as well.
        folder = waiting.popleft() if waiting else links.popleft()
        status = _stat(folder, found.problems)
        if status is None:
            continue
        before = visited.setdefault((status.st_dev, status.st_ino), folder)
        if before != folder:
            found.again.append((before, folder))
        elif folder != root and is_product(folder):
            found.products.append(folder)
        elif folder != root and is_whole(folder):
            found.whole.append(folder)
        else:
            found.folders.append(folder)
            for entry in _entries(folder, found.problems):
                _take(entry, found, waiting, links)
    for paths in (found.files, found.whole, found.products, found.hidden, found.special, found.folders):
        paths.sort(key=lambda path: sort_key(path, root))
    return found


def sort_key(path: str, root: str, is_folder: bool = False) -> tuple[tuple[bool, str], ...]:
    """Orders paths below `root`: the files of a folder, then its subfolders, both by name."""
    *folders, name = path.removeprefix(root).strip(os.sep).split(os.sep)
    return (*((True, folder) for folder in folders), (is_folder, name))


def _take(entry: os.DirEntry[str], found: Listing, waiting: deque[str], links: deque[str]) -> None:
    if entry.name.startswith("."):
        found.hidden.append(entry.path)
    elif (status := _stat(entry.path, found.problems)) is None:
        return
    elif stat.S_ISDIR(status.st_mode):
        (links if entry.is_symlink() else waiting).append(entry.path)
    elif stat.S_ISREG(status.st_mode):
        found.files.append(entry.path)
    else:
        found.special.append(entry.path)


def _stat(path: str, problems: list[str]) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError as error:
        problems.append(explain(path, error))
        return None


def explain(path: str, error: OSError) -> str:
    """Why `path` cannot be read, in words."""
    if error.errno in (errno.ENOENT, errno.ELOOP) and os.path.islink(path):
        return _broken(path)
    if error.errno == errno.ENOENT:
        return f"{path}: {error.strerror}"
    return f"{path}: cannot be read: {error.strerror or error}"


def _broken(link: str) -> str:
    return f"{link}: is a broken link to {os.readlink(link)}; mend or remove it"


def _entries(folder: str, problems: list[str]) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        problems.append(explain(folder, error))
        return []


def match_pattern(pattern: str) -> Listing:
    """The files and folders that match `pattern`, sorted by path; `**` stands for any folders, none included.

    As in the shell, and in Python's `glob`, hidden names match only a pattern that begins with a dot.
    """
    found = Listing()
    places = [""]
    names = pattern.split(os.sep)
    if names[0] == "":
        places, names = [os.sep], names[1:]
    names = [name for number, name in enumerate(names) if name or number == len(names) - 1]
    for number, name in enumerate(names):
        is_last = number == len(names) - 1
        places = list(dict.fromkeys(path for place in places for path in _step(place, name, is_last, found)))
        if not is_last:
            found.problems += [_broken(path) for path in places if os.path.islink(path) and not os.path.exists(path)]
            places = [path for path in places if os.path.isdir(path or os.curdir)]
    for path in sorted(places):
        status = _stat(path, found.problems)
        if status is not None:
            kinds = {stat.S_IFDIR: found.folders, stat.S_IFREG: found.files}
            kinds.get(stat.S_IFMT(status.st_mode), found.special).append(path)
    return found


def _step(place: str, name: str, is_last: bool, found: Listing) -> Iterator[str]:
    """The paths below `place` that one component of a pattern matches."""
    if name == "**":
        below = list_folder(place or os.curdir)
        found.problems += below.problems
        found.again += below.again
        found.hidden += below.hidden
        paths = [*below.folders, *(below.files + below.special if is_last else ())]
        yield from (path if place else _without_dot(path) for path in paths)
    elif glob.has_magic(name) and not _is_escaped(name):
        for entry in _entries(place or os.curdir, found.problems):
            is_hidden = entry.name.startswith(".") and not name.startswith(".")
            if not is_hidden and fnmatch.fnmatchcase(entry.name, name):
                yield os.path.join(place, entry.name)
    else:
        path = os.path.join(place, _MAGIC_IN_BRACKETS.sub(r"\1", name))
        try:
            os.lstat(path or os.curdir)
            yield path
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            found.problems.append(explain(path, error))


def _is_escaped(name: str) -> bool:
    """Whether every special character stands in brackets, as `glob.escape` writes it."""
    return not glob.has_magic(_MAGIC_IN_BRACKETS.sub("", name))


def _without_dot(path: str) -> str:
    return path.removeprefix(os.curdir).lstrip(os.sep)


def root_of_pattern(pattern: str) -> str:
    """The folder before the first special character, below which the files are named."""
    names = pattern.split(os.sep)
    first = next(number for number, name in enumerate(names) if glob.has_magic(name))
    return os.sep.join(names[:first])
