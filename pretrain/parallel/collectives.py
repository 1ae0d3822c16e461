"""Small collectives over plain values, and the rank of this process; they cost a single process nothing."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pretrain.errors import ConfigError, TacoError

if TYPE_CHECKING:
    import torch
    import torch.distributed as distributed


T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def rank() -> int:
    """This process's rank over all nodes; 0 without a process group."""
    import torch.distributed as distributed

    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    import torch.distributed as distributed

    return distributed.get_world_size() if distributed.is_initialized() else 1


def start_side_group() -> distributed.ProcessGroup | None:
    """A second group of all ranks, on the CPU, for a thread beside training; None with a single rank. Collective.

    All ranks must issue the collectives of a group in the same order; two threads in one group would mix theirs.
    """
    import torch.distributed as distributed

    return distributed.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT) if world_size() > 1 else None


def gather_objects(value: T, group: distributed.ProcessGroup | None = None) -> list[T]:
    """Every rank's `value`, in rank order, on every rank (plain types only: they travel as bytes).

    Args:
        group: a group of all ranks, from `start_side_group`; None: the group that training uses.
    """
    import torch.distributed as distributed

    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value, group=group)
    return values


def ask_rank_0(question: Callable[[], T]) -> T:
    """Rank 0's answer (plain types) on every rank: the others may see another state of a shared folder. Collective.

    Raises:
        TacoError: rank 0's, on every rank, with the same exit code.
    """
    answer: T | None = None
    problem: tuple[int, str] | None = None
    if rank() == 0:
        try:
            answer = question()
        except TacoError as error:
            problem = (error.exit_code, str(error))
    answer, problem = gather_objects((answer, problem))[0]
    if problem is not None:
        code, message = problem
        raise (ConfigError if code == ConfigError.exit_code else TacoError)(message)
    return cast(T, answer)


def first_failure(problem: str | None, group: distributed.ProcessGroup | None = None) -> str | None:
    """The vote after every risky step: the first problem of any rank, the same answer on every rank."""
    problems = gather_objects(problem, group)
    return next((f"rank {i}: {text}" for i, text in enumerate(problems) if text is not None), None)


class PendingSum:
    """An element-wise sum over the ranks of a group that goes on beside other work; every rank of it starts one.

    Attributes:
        tensor: the sum, once `wait` has returned; until then nobody may read it.
    """

    def __init__(self, tensor: torch.Tensor, group: distributed.ProcessGroup | None = None) -> None:
        """Start summing `tensor` in place; `group` None: all ranks."""
        import torch.distributed as distributed

        self.tensor = tensor
        is_alone = not distributed.is_initialized() or distributed.get_world_size(group) == 1
        self._work = None if is_alone else distributed.all_reduce(tensor, group=group, async_op=True)

    def wait(self) -> torch.Tensor:
        """The sum. On a GPU only the current stream waits for it, not the host."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self.tensor


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The element-wise sum over all ranks, in place."""
    import torch.distributed as distributed

    if world_size() > 1:
        distributed.all_reduce(tensor)
    return tensor
