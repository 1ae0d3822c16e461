"""What workers do in the tests of the pool: factories that a worker process can import."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain.errors import DataError


def squarer(folder: str) -> Callable[[Any], Any]:
    """Squares numbers; words are commands, done once each if they begin with `once`."""
    return lambda item: obey(Path(folder), item) if isinstance(item, str) else (item * item, bytes(abs(item)))


def obey(folder: Path, word: str) -> str:
    name, _, how = word.partition(" ")
    marker = folder / word
    if name == "once":
        if marker.exists():
            return word
        marker.touch()
        name = how
    if name == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if name == "leave":
        os._exit(3)
    if name == "mistake":
        raise DataError("line 7 is wrong")
    if name == "bug":
        raise KeyError("bug")
    if name == "memory":
        raise MemoryError
    if name == "work":
        time.sleep(0.2)
    if name == "endless":
        time.sleep(1000)
    return word


def unbuildable(argument: str) -> Callable[[Any], Any]:
    raise DataError(f"{argument} cannot be loaded")


def dying(argument: str) -> Callable[[Any], Any]:
    os._exit(9)
