"""Page-locked memory for micro-batches: a GPU copies from it by itself, while the host goes on.

The thread that prepares batches ahead fills it, so no thread copies tokens a second time before they travel.
"""

from __future__ import annotations

import numpy as np

from pretrain.data.batches import Allocate, ordinary_memory


def memory_for(device_type: str) -> Allocate:
    """What to give to `BatchSource` as `allocate` when batches go to a device of this type ("cuda", "cpu")."""
    return pinned_memory if device_type == "cuda" else ordinary_memory


def pinned_memory(num_bytes: int) -> np.ndarray:
    """Page-locked memory, uint8 [num_bytes]; torch keeps what is given back and hands it out again.

    So whoever copies from it asynchronously must hold the array until the copy is over.
    """
    import torch

    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()
