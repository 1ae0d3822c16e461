"""Which attention weights drop: the same in every implementation that is our own, on every device and in every layout.

A line of `dropout_mask` is the weights of one query and head, numbered by the place of the query in its micro-batch and
the head's number in the whole model. Its elements are the keys, counted from the first token of the query's document.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class AttentionDropout(NamedTuple):
    """Dropout of the attention weights in one layer and micro-batch."""

    probability: float
    words: Tensor | None
    """Of the place in the model: `DropoutKey.at`; None only where nothing drops."""
    first_head: int
    """The number of the first head held here, among all `num_heads` of the model."""
    num_heads: int
    row_length: int
    """Elements of a line, whatever the document's length."""

    def lines(self, place_nl: Tensor, num_heads_here: int) -> Tensor:
        """The numbers of the lines of some documents, int64 [n, H, l]; `place_nl` are the places of their tokens."""
        head_H1 = torch.arange(self.first_head, self.first_head + num_heads_here, device=place_nl.device)[:, None]
        return place_nl[:, None] * self.num_heads + head_H1
