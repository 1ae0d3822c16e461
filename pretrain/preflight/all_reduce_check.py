"""A short all-reduce over all ranks before a run: whether they meet, whether sums are right, how fast.

A network fault shows here in seconds, with the names of the missing machines, rather than as a hang in the first step.
Ranks register in a separate store that rank 0 keeps, so missing ranks can be named. DeepSpeed is not needed here, so
this is not `parallel.start_process_group`.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from pretrain.errors import TacoError

if TYPE_CHECKING:
    import torch
    import torch.distributed as distributed

    from pretrain.parallel.launch import Launch

_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}
_REPEATS = 5


class MissingRanksError(TacoError):
    """Ranks did not connect, or did not finish; `nodes` are the machines to leave out, if these are a minority."""

    def __init__(self, message: str, nodes: Sequence[str]) -> None:
        super().__init__(message)
        self.nodes = list(nodes)


def check_all_reduce(launch: Launch, device: torch.device, nodes: Sequence[str], timeout: float) -> str:
    """Meet all ranks at MASTER_ADDR:MASTER_PORT and sum over them; returns size and speed in words.

    Args:
        nodes: names of the machines in the order of their ranks.
        timeout: seconds to connect, and again for the sums.

    Raises:
        MissingRanksError: on rank 0, with the machines of the ranks that are missing.
        TacoError: a sum is wrong, or this rank cannot reach the meeting point.
    """
    import torch.distributed as distributed

    limit = timedelta(seconds=timeout)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = distributed.TCPStore(
            host, port, launch.world_size, launch.rank == 0, timeout=limit, wait_for_workers=False
        )
    except (distributed.DistError, RuntimeError) as error:
        first_line = str(error).splitlines()[0]
        raise TacoError(
            f"{socket.gethostname()}: the meeting point {host}:{port} cannot be reached: {first_line}; "
            "look at firewalls and host names, or name another one with TACO_MASTER_ADDR, TACO_MASTER_PORT"
        ) from None
    _sign(store, "came", launch)
    if launch.rank == 0:
        _wait_for_all(store, "came", launch, nodes, timeout)
    # The sums may hang inside a library, where no exception can be raised.
    alarm = threading.Timer(timeout, _give_up, (launch, nodes, store, timeout))
    alarm.daemon = True
    alarm.start()
    description = _sum_and_time(launch, device, distributed.PrefixStore("sums", store), limit)
    _sign(store, "done", launch)
    if launch.rank == 0:  # the store ends with this process
        _wait_for_all(store, "done", launch, nodes, timeout)
    alarm.cancel()
    return description


def _sum_and_time(launch: Launch, device: torch.device, store: distributed.Store, limit: timedelta) -> str:
    import torch
    import torch.distributed as distributed

    backend = "gloo" if device.type == "cpu" else "nccl"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=limit)
    numbers = torch.full((_ELEMENTS[device.type],), float(launch.rank + 1), device=device)
    expected = launch.world_size * (launch.world_size + 1) / 2
    distributed.all_reduce(numbers)
    if not bool((numbers == expected).all()):
        raise TacoError(
            f"{socket.gethostname()}: an all-reduce of 1 ... {launch.world_size} gave {numbers.unique().tolist()[:4]} "
            f"instead of {expected}: a link or a GPU changes data; leave the machine out"
        )
    start = time.monotonic()
    for _ in range(_REPEATS):
        distributed.all_reduce(numbers)
    numbers[0].item()  # waits for the device
    seconds = (time.monotonic() - start) / _REPEATS
    distributed.destroy_process_group()
    rate = numbers.numel() * numbers.element_size() / max(seconds, 1e-9)
    return (
        f"{launch.world_size} ranks, {numbers.numel() * 4 >> 20} MiB in {1e3 * seconds:.1f} ms ({rate / 1e9:.2f} GB/s)"
    )


def _sign(store: distributed.Store, name: str, launch: Launch) -> None:
    store.set(f"{name}/{launch.rank}", socket.gethostname())


def _wait_for_all(store: distributed.Store, name: str, launch: Launch, nodes: Sequence[str], timeout: float) -> None:
    """Rank 0 waits until every rank has signed.

    Raises:
        MissingRanksError: some have not after `timeout` seconds.
    """
    end = time.monotonic() + timeout
    while missing := _missing(store, name, launch):
        if time.monotonic() > end:
            raise _missing_ranks(missing, launch, nodes, timeout)
        time.sleep(0.05)


def _missing(store: distributed.Store, name: str, launch: Launch) -> list[int]:
    return [rank for rank in range(launch.world_size) if not store.check([f"{name}/{rank}"])]


def _missing_ranks(missing: list[int], launch: Launch, nodes: Sequence[str], timeout: float) -> MissingRanksError:
    missing_nodes = [nodes[rank // launch.local_world_size] for rank in missing if nodes]
    names = list(dict.fromkeys(missing_nodes))
    shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    return MissingRanksError(
        f"all-reduce: {len(missing)} of {launch.world_size} ranks missing after {timeout:.0f} s: {shown} on "
        f"{', '.join(names) or 'unknown machines'}; look at their network, firewall and messages",
        # If most are missing, or all because the sums hang, nobody can say which machine is at fault.
        names if 2 * len(names) <= len(nodes) else [],
    )


def _give_up(launch: Launch, nodes: Sequence[str], store: distributed.Store, timeout: float) -> None:
    """End a process whose sums hang; rank 0 names the ranks that have not finished."""
    if launch.rank == 0:
        error = _missing_ranks(_missing(store, "done", launch), launch, nodes, timeout)
        print(f"error: {error}", file=sys.stderr, flush=True)
        print(",".join(error.nodes), flush=True)
    os._exit(1)
