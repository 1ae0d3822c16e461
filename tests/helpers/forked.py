"""Several gloo processes inside a test: forked after the heavy imports, so a case costs a second instead of ten.

One file per result and log; the first rank that fails ends the others, and its traceback is what the test shows.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# DeepSpeed and torch import these when an engine is built: 1,500 modules, three seconds in every forked rank otherwise.
import deepspeed.utils.zero_to_fp32  # noqa: F401
import torch._dynamo
import torch._inductor.compile_fx  # noqa: F401


class RankFailedError(AssertionError):
    """A forked rank raised or died; carries its traceback or the end of its log."""


def run_ranks(
    world_size: int, work: Callable[..., Any], *args: Any, timeout: float = 120.0, **kwargs: Any
) -> list[Any]:
    """`work(*args, **kwargs)` in `world_size` forked processes with torchrun's variables set; results in rank order.

    Raises:
        RankFailedError: a rank raised, died or did not end within `timeout` seconds.
    """
    port = _free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = {_fork(rank, world_size, port, folder, work, args, kwargs) for rank in range(world_size)}
        _wait(processes, timeout)
        return [_result(folder, rank) for rank in range(world_size)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _fork(rank: int, world_size: int, port: int, folder: Path, work: Callable[..., Any], args: Any, kwargs: Any) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        log = os.open(folder / f"log{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        outcome: tuple[bool, Any] = (True, work(*args, **kwargs))
        status = 0
    except BaseException:  # noqa: BLE001  # whatever ends the rank is the test's result
        outcome = (False, traceback.format_exc())
    (folder / f"result{rank}.tmp").write_bytes(pickle.dumps(outcome))
    (folder / f"result{rank}.tmp").rename(folder / f"result{rank}")
    os._exit(status)


def _wait(processes: set[int], timeout: float) -> None:
    end = time.monotonic() + timeout
    while processes and time.monotonic() < end:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process in processes:
            processes.discard(process)
            if status:
                end = min(end, time.monotonic() + 3)  # the others may fail on their own and say why
        elif process == 0:
            time.sleep(0.01)
    for process in processes:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def _result(folder: Path, rank: int) -> Any:
    path = folder / f"result{rank}"
    if not path.exists():
        log = (folder / f"log{rank}").read_text(errors="replace")[-2000:]
        raise RankFailedError(f"rank {rank} died or was killed after the time-out; its log ends with:\n{log}")
    succeeded, value = pickle.loads(path.read_bytes())  # noqa: S301  # written by our own child a moment ago
    if not succeeded:
        raise RankFailedError(f"rank {rank}:\n{value}")
    return value
