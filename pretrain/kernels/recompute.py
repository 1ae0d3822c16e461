"""What is cheap is computed again in backward instead of being kept: the output of an element-wise function."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def recomputed_for_backward(
    result: Tensor, function: Callable[[Tensor], Tensor], source: Tensor
) -> AbstractContextManager[Any]:
    """While it is entered, whatever would keep `result` for backward computes function(`source`) then.

    It works for any product: torch's, a tensor-parallel one, one whose weight ZeRO-3 gathers. `source` must be kept by
    something else too, or nothing is saved. The bits are those of `result`. A compiler that traces decides for itself
    what it keeps, so nothing is done then.
    """
    if torch.compiler.is_compiling() or not result.requires_grad:
        return nullcontext()
    source, shape, place = source.detach(), result.shape, result.data_ptr()

    def pack(tensor: Tensor) -> Tensor | None:
        is_result = tensor.data_ptr() == place and tensor.shape == shape
        return None if is_result else tensor

    def unpack(packed: Tensor | None) -> Tensor:
        if packed is not None:
            return packed
        with torch.no_grad():
            return function(source)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
