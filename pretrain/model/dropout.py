"""Dropout that is cheap on a CPU too, and a function of (seed, micro-batch, place in the model).

Every place that drops units first seeds the generator. So neither the number of ranks nor the split into pipeline
stages changes which units drop, a layer that is recomputed in the backward pass drops the same units, and a resumed
run needs no random state.

On a CPU torch draws one 64-bit number per element, on one thread, and keeps the mask as floats: a tenth of a small
model's step. Here one number serves four elements, and the mask takes one byte each. Other devices use torch's dropout.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_LEVELS = 1 << 16


class DropoutKey(NamedTuple):
    """Determines, together with the place in the model, which units drop."""

    seed: int
    micro_batch_index: int
    """Number of the micro-batch over all data-parallel ranks and steps."""


def seed_dropout(key: DropoutKey | None, place: str, device: torch.device) -> None:
    """Seed the default generator of `device` for one place in the model; without a key, leave its state alone."""
    if key is None:
        return
    text = f"dropout {key.seed} {key.micro_batch_index} {place}"
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    # Seed the generator directly: torch.manual_seed visits every kind of device.
    generator = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index]
    generator.manual_seed(seed)


def dropout(hidden: Tensor, probability: float, is_training: bool) -> Tensor:
    """`hidden` with each element set to 0 with `probability` and the others scaled up, in training only.

    Draws from torch's default generator of the device.
    """
    if not is_training or probability == 0.0:
        return hidden
    if hidden.device.type != "cpu":
        return F.dropout(hidden, probability)
    keep, scale = draw_keep(tuple(hidden.shape), probability)
    return (hidden * keep).mul_(scale)


def draw_keep(shape: tuple[int, ...], probability: float) -> tuple[Tensor, float]:
    """Which elements to keep (bool, on the CPU), and the factor that preserves their mean.

    `probability` is rounded to a multiple of 1 / 65,536; the factor belongs to the rounded probability.
    """
    num_elements = torch.Size(shape).numel()
    words = torch.empty(-(-num_elements // 4), dtype=torch.int64).random_(-(2**63), None)
    num_dropped = min(round(_LEVELS * probability), _LEVELS - 1)
    keep = words.view(torch.int16)[:num_elements].view(shape) >= num_dropped - _LEVELS // 2
    return keep, _LEVELS / (_LEVELS - num_dropped)
