"""Allows one run at a time per output prefix: PREFIX.lock, which the system releases when the process ends.

A file of that name with other content is somebody else's, and stays.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from pathlib import Path
from types import TracebackType
from typing import TextIO

from data_tools.output.protection import in_the_way, refuse_foreign_temporaries
from data_tools.own_files import is_lock
from pretrain.errors import DataError


class RunLock:
    """Holds PREFIX.lock; use it as a context manager. A lock whose holder is dead is free."""

    def __init__(self, prefix: str | Path) -> None:
        self._prefix, self._path = str(prefix), Path(f"{prefix}.lock")

    def __enter__(self) -> RunLock:
        """Takes the lock.

        Raises:
            DataError: another run holds it, it cannot be written, or it or an unfinished file is not of our making.
        """
        try:
            if not os.path.lexists(self._path):
                refuse_foreign_temporaries(self._prefix)
            while not self._take():
                pass
        except OSError as error:
            raise DataError(f"{self._path}: cannot be written: {error.strerror}; choose another folder") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._path.unlink(missing_ok=True)
        self._file.close()

    def _take(self) -> bool:
        """Takes the lock; False if its last holder has just removed the file."""
        if self._path.is_symlink():
            raise in_the_way(self._path)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise in_the_way(self._path)
        file = open(descriptor, "r+", encoding="utf-8", errors="replace")  # noqa: SIM115 - held until the end
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read(file)
            file.close()
            raise DataError(
                f"{self._path}: another run writes this dataset ({holder or 'an unknown process'}); "
                "wait for it, end it, or choose another output prefix"
            ) from None
        if not _is_same_file(file, self._path):
            file.close()
            return False
        file.seek(0)
        if not is_lock(file.read().encode()):
            file.close()
            raise in_the_way(self._path)
        file.seek(0)
        file.truncate(0)
        file.write(f"host {socket.gethostname()}, pid {os.getpid()}, job {os.environ.get('SLURM_JOB_ID', 'none')}\n")
        file.flush()
        self._file = file
        return True


def _read(file: TextIO) -> str:
    file.seek(0)
    return file.read(1000).strip()


def _is_same_file(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
