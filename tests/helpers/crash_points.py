"""Every moment at which a program that writes files can be killed, or the power can fail.

`killed_at` runs work in a process of its own and kills it before its n-th change of the file system below a folder.
`LosingDisk` watches work in this process and knows at every change what a disk would still have after a power loss:
of files the content of their last fsync, of folders the names of their last fsync, and of everything later anything.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from child_process import fork

# Python tells hooks of these before it does them; fsync is told by nobody and wrapped.
CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}

_listener: Callable[[str, tuple[Any, ...]], None] | None = None
_is_hooked = False
_real_fsync = os.fsync


@contextmanager
def listening(listener: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """Call `listener(name, arguments)` before every change of a file system by Python, and before every fsync."""
    global _listener, _is_hooked
    if not _is_hooked:
        sys.addaudithook(_hear)  # for good: hooks cannot be taken away
        _is_hooked = True

    def fsync(descriptor: int) -> None:
        _tell("before fsync", (descriptor,))
        _real_fsync(descriptor)
        _tell("fsync", (descriptor,))

    _listener, os.fsync = listener, fsync
    try:
        yield
    finally:
        _listener, os.fsync = None, _real_fsync


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if event in CHANGES and (event != "open" or _is_writing(arguments)):
        _tell(event, arguments)


def _tell(event: str, arguments: tuple[Any, ...]) -> None:
    global _listener
    if (listener := _listener) is not None:
        _listener = None  # what the listener itself does is no event
        try:
            listener(event, arguments)
        finally:
            _listener = listener


def path_of(arguments: tuple[Any, ...]) -> str:
    """The path that an event is about; those relative to an open folder (shutil.rmtree) are resolved."""
    first = arguments[0]
    if isinstance(first, int):
        return os.readlink(f"/proc/self/fd/{first}")
    name = os.fsdecode(first)
    folder = next((word for word in arguments[1:] if isinstance(word, int) and word > 2), None)
    if not os.path.isabs(name) and folder is not None:
        return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)
    return os.path.abspath(name)


def killed_at(number: int, folder: Path, work: Callable[[], object]) -> bool:
    """Run `work` in a forked process that kills itself before its change number `number` below `folder`.

    Returns whether it was killed; False if it came to its end with fewer changes.
    """
    left = number

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if not is_below(folder, arguments):
            return
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    def listen_and_work() -> None:
        with listening(count):
            work()

    pid = fork(listen_and_work)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL), f"the work itself failed with code {status}"
    return status != 0


def is_below(folder: Path, arguments: tuple[Any, ...]) -> bool:
    """Whether an event is about `folder` or something in it."""
    path = path_of(arguments)
    return path == str(folder) or path.startswith(f"{folder}{os.sep}")


def _is_writing(arguments: tuple[Any, ...]) -> bool:
    return isinstance(arguments[2], int) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))


@dataclass(eq=False)  # an inode is itself, whatever it holds
class _Folder:
    """Names of a folder and what they mean, as of its last fsync, and each state of them since then."""

    entries: dict[str, _Folder | _File] = field(default_factory=dict)
    later: list[dict[str, _Folder | _File]] = field(default_factory=list)


@dataclass(eq=False)  # an inode is itself, whatever it holds
class _File:
    """Content of a file as of its last fsync."""

    content: bytes = b""


class LosingDisk:
    """Follows the changes below `root`; `lose(into, rng)` writes what may be left of it if the power fails now.

    Without `rng` everything that was not fsynced is lost. With one, each folder is as it was at any moment since its
    fsync, whatever the others are, and a file that is newer than its fsync has any part of its content.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._known: dict[int, _Folder | _File] = {}
        self._durable = self._scan(root)

    def notice(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Take note of what has changed, of an fsync that has come back, or of a file about to lose its name."""
        self._look(self.root)
        if event == "fsync":
            path = Path(path_of(arguments))
            if path == self.root or path.is_relative_to(self.root):
                self._sync(path)
        elif event in ("os.remove", "os.rmdir"):
            self._forget(path_of(arguments))
        elif event == "os.rename":
            self._forget(os.path.abspath(os.fsdecode(arguments[1])))

    def lose(self, into: Path, rng: random.Random | None = None) -> None:
        """Make the folder `into` with what is left."""
        into.mkdir()
        self._write(self._durable, into, rng)

    def _scan(self, folder: Path) -> _Folder:
        """What is there at the beginning has been there for long."""
        found = _Folder()
        self._known[folder.stat().st_ino] = found
        for path in folder.iterdir():
            entry = self._scan(path) if path.is_dir() else _File(path.read_bytes())
            self._known[path.stat().st_ino] = found.entries[path.name] = entry
        return found

    def _object(self, path: Path) -> _Folder | _File:
        inode = path.stat().st_ino
        if inode not in self._known:
            self._known[inode] = _Folder() if path.is_dir() else _File()
        return self._known[inode]

    def _forget(self, path: str) -> None:
        """The number of a removed file may be given to a new one; what the disk has of the old one stays there."""
        if os.path.lexists(path):
            self._known.pop(os.lstat(path).st_ino, None)

    def _look(self, path: Path) -> None:
        """Keep the names that a folder, and every folder in it, has now."""
        folder = self._object(path)
        assert isinstance(folder, _Folder)
        now = {child.name: self._object(child) for child in path.iterdir()}
        if now != (folder.later[-1] if folder.later else folder.entries):
            folder.later.append(now)
        for child in path.iterdir():
            if child.is_dir():
                self._look(child)

    def _sync(self, path: Path) -> None:
        found = self._object(path)
        if isinstance(found, _File):
            found.content = path.read_bytes()
        else:
            found.entries = {child.name: self._object(child) for child in path.iterdir()}
            found.later = []

    def _write(self, found: _Folder, into: Path, rng: random.Random | None) -> None:
        entries = found.entries if rng is None else rng.choice([found.entries, *found.later])
        for name, entry in entries.items():
            if isinstance(entry, _Folder):
                (into / name).mkdir()
                self._write(entry, into / name, rng)
            else:
                (into / name).write_bytes(entry.content if rng is None else self._cut(entry, rng))

    def _cut(self, file: _File, rng: random.Random) -> bytes:
        now = next((self._read(inode) for inode, entry in self._known.items() if entry is file), file.content)
        return file.content if now == file.content else now[: rng.randrange(len(now) + 1)]

    def _read(self, inode: int) -> bytes:
        """The content of a file as programs see it now; empty where it has no name any more."""
        found = (path for path in self.root.rglob("*") if path.stat().st_ino == inode)
        return next((path.read_bytes() for path in found), b"")
