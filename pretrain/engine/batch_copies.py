"""Micro-batches on their way to a GPU: one copy each, beside what the GPU computes meanwhile.

A copy on the stream that computes would start when the previous micro-batch has ended; on a stream of its own it runs
beside it, and the computing stream waits for an event that has nearly always happened by then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pretrain.data.batches import Batch
from pretrain.model.token_rows import TokenRows


@dataclass(frozen=True)
class DeviceBatch:
    """The inputs of a micro-batch on the device that computes, in the order of the model's arguments."""

    tensors: tuple[Tensor, ...]
    micro_batch_index: int
    rows: TokenRows


@dataclass(frozen=True)
class _Underway:
    """A micro-batch whose copy was started, the memory that it lands in, and the event that ends it."""

    batch: DeviceBatch
    blocks: tuple[Tensor, ...]
    event: torch.cuda.Event | None


class BatchCopies:
    """Copies micro-batches to a device, each while the one before it is computed.

    Args:
        plan_rows: the model's, see `model.token_rows`.
        has_varying_sizes: False if the plan is the same for all micro-batches of a shape; then it is copied once.
    """

    def __init__(
        self, device: torch.device, plan_rows: Callable[[np.ndarray], TokenRows], *, has_varying_sizes: bool
    ) -> None:
        self._device = device
        self._plan_rows = plan_rows
        self._has_varying_sizes = has_varying_sizes
        self._same_rows: dict[tuple[int, ...], TokenRows] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, batch: Batch) -> _Underway:
        """Begin to copy. The caller keeps `batch` until a result of the micro-batch has come back."""
        if self._stream is None:
            tensors, _ = copy_together(_arrays(batch), lambda block: block)
            return _Underway(DeviceBatch(tensors, batch.micro_batch_index, self._plan(batch)), (), None)
        with torch.cuda.stream(self._stream):
            tensors, block = copy_together(_arrays(batch), self._send)
            on_device = DeviceBatch(tensors, batch.micro_batch_index, self._plan(batch))
            event = torch.cuda.Event()
            event.record(self._stream)
        rows = [part for part in on_device.rows if isinstance(part, Tensor)] if self._has_varying_sizes else []
        return _Underway(on_device, (*block, *rows), event)

    def finish(self, underway: _Underway, *, is_released: bool = False) -> DeviceBatch:
        """Let the current stream wait for the copy; the host does not, unless the caller releases the batch now."""
        if underway.event is not None:
            if is_released:  # page-locked memory, which its next owner overwrites
                underway.event.synchronize()
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(underway.event)
            for block in underway.blocks:  # its memory is of the copying stream, which might use it again too early
                block.record_stream(stream)
        return underway.batch

    def _plan(self, batch: Batch) -> TokenRows:
        if self._has_varying_sizes:
            return self._plan_rows(batch.segment_BL).to(self._device, non_blocking=True)
        shape = batch.segment_BL.shape
        if shape not in self._same_rows:
            self._same_rows[shape] = self._plan_rows(batch.segment_BL).to(self._device)
        return self._same_rows[shape]

    def _send(self, block: Tensor) -> Tensor:
        """Asynchronous from page-locked memory; from other memory the host waits."""
        return block.to(self._device, non_blocking=block.is_pinned())


def copy_together(
    arrays: Sequence[np.ndarray], send: Callable[[Tensor], Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The tensors of some arrays, sent as one block if they lie in one, else one by one.

    Returns:
        The tensors, and the blocks (uint8) that they are views of.
    """
    block = _common_block(arrays)
    if block is None:
        sent = tuple(send(torch.from_numpy(array)) for array in arrays)
        return sent, sent
    start, there = block.__array_interface__["data"][0], send(torch.from_numpy(block))
    tensors = []
    for array in arrays:
        first = array.__array_interface__["data"][0] - start
        dtype = torch.from_numpy(array[:0]).dtype
        tensors.append(there[first : first + array.nbytes].view(dtype).view(array.shape))
    return tuple(tensors), (there,)


def _arrays(batch: Batch) -> tuple[np.ndarray, ...]:
    return batch.input_ids_BL, batch.segment_BL, batch.valid_BL, batch.masked_index_M, batch.masked_label_M


def _common_block(arrays: Sequence[np.ndarray]) -> np.ndarray | None:
    """The uint8 array that all of them are contiguous views of; None if there is none."""
    roots = {id(root): root for root in map(_root, arrays)}
    (block, *others) = roots.values()
    is_block = block.dtype == np.uint8 and block.ndim == 1 and block.flags.c_contiguous
    return block if is_block and not others and all(array.flags.c_contiguous for array in arrays) else None


def _root(array: np.ndarray) -> np.ndarray:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array
