"""Turns what libraries raise when a machine has run out of something into one line with the numbers of this run."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.errors import DataError, TacoError

if TYPE_CHECKING:
    from pretrain.config.sections import RunConfig
    from pretrain.parallel.launch import Launch

# torch's CPU allocator, C++'s, and a thread without memory for its stack raise plain RuntimeErrors.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "can't start new thread")
_GUESSED_VOCAB_SIZE = 32_768


class OutOfMemoryError(TacoError):
    """This rank needs more memory than there is."""


class PortInUseError(TacoError):
    """Another program on this machine uses the port where ranks meet."""


@contextmanager
def machine_limits_explained(config: RunConfig, launch: Launch) -> Iterator[None]:
    """Explain what a run needs if memory ran out, or which port is taken, instead of a library's message.

    Raises:
        OutOfMemoryError: with an estimate per rank, and the keys that lower it.
        PortInUseError: with the port and how to have another one.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if _is_out_of_memory(error):
            raise OutOfMemoryError(_explain_memory(config, launch, error)) from error
        if "EADDRINUSE" in str(error):
            raise PortInUseError(_explain_port()) from error
        raise


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, TacoError):
        return False
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def _explain_memory(config: RunConfig, launch: Launch, error: BaseException) -> str:
    from pretrain.planner.memory import estimate_memory

    estimate = estimate_memory(config, _vocab_size(config), launch.world_size)
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return (
        f"{socket.gethostname()}: out of memory ({reason}); {estimate.num_parameters:,} parameters with ZeRO-"
        f"{config.zero.stage} on {launch.world_size} processes need about {estimate}. Lower train.micro_batch_size, "
        "set train.recompute=layers:all, raise zero.stage or parallel.tensor, start more processes, or lift the limit"
    )


def _vocab_size(config: RunConfig) -> int:
    """That of the first dataset, or a typical one if there is not even memory to look."""
    from pretrain.data.dataset.manifest import Manifest

    try:
        manifest = Manifest.load(Path(config.data.train[0] + ".json"))
    except (DataError, MemoryError, OSError):
        return _GUESSED_VOCAB_SIZE
    return _GUESSED_VOCAB_SIZE if manifest.tokenizer is None else manifest.tokenizer.vocab_size


def _explain_port() -> str:
    place = f"{os.environ.get('MASTER_ADDR', 'localhost')}:{os.environ.get('MASTER_PORT', '29500')}"
    return (
        f"{socket.gethostname()}: the port of {place} (MASTER_ADDR, MASTER_PORT), where ranks meet, is in use by "
        "another program; set MASTER_PORT to a free one, or let the launcher find one: `taco train --processes N`, or "
        "torchrun --rdzv-backend c10d --rdzv-endpoint localhost:0"
    )
