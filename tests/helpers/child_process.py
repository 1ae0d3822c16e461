"""A forked process that never comes back into the test it was forked from."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


def fork(work: Callable[[], object], log: Path | None = None) -> int:
    """`work()` in a forked process, whose number this is; what it prints goes to `log`, if there is one.

    It ends as a program does: with the code of SystemExit, 1 and a traceback after any other exception, and 0. It never
    returns into the test, whatever `work` raises: pytest would go on in two processes.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    return os.fork() or _end_after(work, log)


def _end_after(work: Callable[[], object], log: Path | None) -> NoReturn:
    code: object = 1
    try:
        if log is not None:
            _print_to(log)
        work()
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001  # as the interpreter would print it
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _print_to(log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    # Not what pytest has put there.
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
