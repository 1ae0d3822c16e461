"""Stands in for CUDA graphs on a CPU: what was recorded is called again, and whatever else it reads is an error.

A graph reads the memory that was there when it was recorded. So a call may read the inputs and parameters of the
recording, which its owner fills before a replay, and what the call itself has made; a tensor from anywhere else would
be a stale one in a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Tensors = tuple[Tensor, ...]
# A CPU's attention looks at the bounds of documents on the host and makes indices of them; a GPU's does not.
FROM_HOST = torch.ops.aten.lift_fresh.default


class CalledAgain:
    """A `Recorder` of `engine/graphs.py`. `foreign_reads` names the operations that read what no graph could follow."""

    def __init__(self) -> None:
        self.num_recorded = 0
        self.num_replays = 0
        self.foreign_reads: list[str] = []
        self._known: dict[int, Any] = {}

    def warm_up(self, run: Callable[[], Any]) -> None:
        run()

    def record(self, run: Callable[[], Tensors], memory: Iterable[Tensor]) -> tuple[Tensors, Callable[[], None]]:
        self.num_recorded += 1
        kept = list(memory)
        outputs = self._watched(run, kept)

        def replay() -> None:
            self.num_replays += 1
            for output, fresh in zip(outputs, self._watched(run, kept), strict=True):
                output.detach().copy_(fresh.detach())

        return outputs, replay

    def _watched(self, run: Callable[[], Tensors], memory: list[Tensor]) -> Tensors:
        with torch.enable_grad(), _Reads(self.foreign_reads, self._known, memory):
            return run()


class _Reads(TorchDispatchMode):
    """Notes operations whose inputs are neither known nor made by an earlier operation."""

    def __init__(self, foreign_reads: list[str], known: dict[int, Any], memory: Iterable[Tensor]) -> None:
        super().__init__()
        self._foreign_reads, self._known = foreign_reads, known
        self._learn(memory)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)) if operation is not FROM_HOST else ():
            if tensor.untyped_storage()._cdata not in self._known:
                self._foreign_reads.append(f"{operation} of {tuple(tensor.shape)}")
        result = operation(*args, **(kwargs or {}))
        self._learn(_tensors(result))
        return result

    def _learn(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = storage  # kept, so that no other storage gets its address


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
