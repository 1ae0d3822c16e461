"""Page-locked memory for micro-batches: a GPU copies from it asynchronously, while the host continues.

The thread that prefetches batches fills it directly, so tokens are not copied a second time before the transfer.
"""

from __future__ import annotations

import numpy as np

from pretrain.data.batches import Allocate, ordinary_memory


def memory_for(device_type: str) -> Allocate:
    """The `allocate` argument of `BatchSource` for batches that go to a device of this type ("cuda", "cpu")."""
    return pinned_memory if device_type == "cuda" else ordinary_memory


def pinned_memory(num_bytes: int) -> np.ndarray:
    """Page-locked memory, uint8 [num_bytes]; torch reuses it once it is freed.

    A caller that copies from it asynchronously must therefore keep the array until the copy is done.
    """
    import torch

    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()
