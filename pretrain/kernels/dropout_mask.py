"""Which units drop: a function of (seed, micro-batch, place in the model, element), the same on every device.

What drops together is a line of elements: the features of a token, or one head's attention weights of a query. Element
e of line n is half-word e % 8 of block n * ceil(width / 8) + e // 8, the low half of a word first. A block is one call
of Philox 4x32 with 7 rounds, the fewest that pass BigCrush (Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3"). On a CPU C++ draws the same bits (csrc/include/taco/step.hpp), in Triton `philox.py` does.

Shape letters: N lines, W elements of a line.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.data.native import native
from pretrain.objectives.philox import MASK_32, philox_4x32

NUM_WORDS = 8
"""Words of a place: key low, key high, place << 16, micro-batch low and high; three are free, to align places."""
BLOCK_SIZE = 8
_NUM_ROUNDS = 7
_LEVELS = 1 << 16


def drop_threshold(probability: float) -> int:
    """Half-words below it drop: the probability in units of 1 / 65,536, at most 65,535."""
    return min(round(_LEVELS * probability), _LEVELS - 1)


def keep_scale(threshold: int) -> float:
    """The factor that preserves the mean of what is kept."""
    return _LEVELS / (_LEVELS - threshold)


class HiddenDropout(NamedTuple):
    """Which hidden units drop at one place of the model in one micro-batch; a line is the features of a token."""

    probability: float
    words: Tensor
    """Of the place: `model.dropout.DropoutKey`."""
    first_line: int = 0
    """The number of token 0 in its micro-batch, which the others follow."""
    line_N: Tensor | None = None
    """The numbers of the tokens, int64, where they do not."""

    def apply(self, hidden_ND: Tensor) -> Tensor:
        """`hidden_ND` with what drops set to 0 and the rest scaled up, in plain torch."""
        num_lines, width = hidden_ND.shape
        line_N = self.line_N
        if line_N is None:
            line_N = torch.arange(self.first_line, self.first_line + num_lines, device=hidden_ND.device)
        scale = keep_scale(drop_threshold(self.probability))
        return hidden_ND * keep_mask(self.words, line_N, width, self.probability) * scale


def keep_mask(words: Tensor, lines: Tensor, width: int, probability: float) -> Tensor:
    """Which elements to keep, bool [*lines.shape, W].

    Args:
        words: int64, of one place in the model (`DropoutKey`), on the device of the result.
        lines: int64, the numbers of the lines, any shape.
        probability: of an element to drop; it is rounded to a multiple of 1 / 65,536.
    """
    threshold = drop_threshold(probability)
    if is_native(words):
        keep = torch.empty(lines.numel(), width, dtype=torch.bool)
        line_N = lines.reshape(-1).contiguous().numpy()
        native().fill_keep(words.numpy(), threshold, line_N, 0, keep.numpy(), torch.get_num_threads())
        return keep.view(*lines.shape, width)
    return draw_levels(words, lines, width) >= threshold


def draw_levels(words: Tensor, lines: Tensor, width: int) -> Tensor:
    """The random half-words of lines, int64 [*lines.shape, W], in plain torch: the definition."""
    num_blocks = -(-width // BLOCK_SIZE)
    block = lines[..., None] * num_blocks + torch.arange(num_blocks, device=words.device)
    key_low, key_high, place, batch_low, batch_high = words[:5].unbind()
    counter = (block & MASK_32, (block >> 32) | place, batch_low, batch_high)
    drawn = torch.stack(philox_4x32(counter, (key_low, key_high), _NUM_ROUNDS), dim=-1)
    levels = torch.stack([drawn & 0xFFFF, drawn >> 16], dim=-1)
    return levels.flatten(-3)[..., :width]


def is_native(*tensors: Tensor) -> bool:
    """Whether C++ may compute with tensors: fp32 or int64 in the memory of a CPU, and nothing is tracing."""
    return not torch.compiler.is_compiling() and all(
        tensor.device.type == "cpu" and tensor.dtype in _NATIVE_TYPES and type(tensor) in _PLAIN for tensor in tensors
    )


_NATIVE_TYPES = (torch.float32, torch.int64)
_PLAIN = (Tensor, torch.nn.Parameter)
