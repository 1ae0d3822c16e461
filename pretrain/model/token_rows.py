"""Which tokens of a micro-batch the model computes, in which order, and which of them attend to each other.

Padding takes no part in the model: its tokens are left out before the embedding, and every later tensor holds the T
tokens that remain, document after document (Portes et al. 2023, MosaicBERT; Warner et al. 2024, ModernBERT). A document
is what attends to itself alone: one document of a packed row, or all tokens of a row in the other row modes. The plan
is made on the host, from arrays that are there anyway, so nothing waits for a GPU to count tokens.

Shape letters: B rows, L tokens per row, G = B * L places of the grid in (row, column) order, T computed tokens, N
documents, K blocks of tokens, M masked positions, D features.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain.kernels.attention_choice import ATTENTION_BLOCK

# Where the number of tokens must be a multiple of something, some padding is computed too, in documents of its own,
# short ones, because attention costs the square of the length.
_PADDING_DOCUMENT = 64
_MULTIPLE = 16  # wanted by 8-bit products, and harmless elsewhere


class TokenRows(NamedTuple):
    """The tokens of a micro-batch: without `place_T` all of them, and without `bound_N1` every row is one document."""

    num_rows: int
    length: int
    """Tokens of a row, padding included."""
    place_T: Tensor | None = None
    """int64: where each token stands in the grid, row * L + column."""
    token_G: Tensor | None = None
    """int64: the number of the token at each place of the grid; 0 for padding."""
    position_T: Tensor | None = None
    """int64: the position that its embedding gets."""
    bound_N1: Tensor | None = None
    """int32: the first token of each document, then T."""
    block_K3: Tensor | None = None
    """int32: for each block its first token, and the first token and the end of its document."""
    mask: Tensor | None = None
    """`attention_mask`'s, for an attention that works on the grid."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.num_rows * self.length if self.place_T is None else len(self.place_T)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> TokenRows:
        """The same rows with their tensors on `device`; `non_blocking` copies them from page-locked memory."""
        if device.type == "cpu":
            return self
        return TokenRows(self.num_rows, self.length, *(_move(part, device, non_blocking) for part in self[2:]))

    def take(self, grid: Tensor) -> Tensor:
        """What stands at the tokens, [T], of a grid [B, L]."""
        return grid.flatten() if self.place_T is None else grid.flatten().index_select(0, self.place_T)

    def find(self, place_M: Tensor) -> Tensor:
        """The numbers [M] of the tokens at some places of the grid."""
        return place_M if self.token_G is None else self.token_G.index_select(0, place_M)

    def places(self, first: int, num_tokens: int) -> Tensor | None:
        """Where some tokens that follow each other stand in the grid; None where a token's number says it."""
        return None if self.place_T is None else self.place_T[first : first + num_tokens]

    def spread(self, token_TD: Tensor) -> Tensor:
        """The tokens at their places [G, D] (or [G] of [T]), with zeros at padding."""
        if self.place_T is None:
            return token_TD
        grid_GD = token_TD.new_zeros(self.num_rows * self.length, *token_TD.shape[1:])
        return grid_GD.index_copy(0, self.place_T, token_TD)


def full_rows(num_rows: int, length: int) -> TokenRows:
    """Rows without padding that are one document each, on the CPU."""
    bound_N1 = np.arange(num_rows + 1) * length
    return TokenRows(
        num_rows,
        length,
        bound_N1=torch.from_numpy(bound_N1.astype(np.int32)),
        block_K3=torch.from_numpy(_blocks(bound_N1)),
    )


def plan_rows(segment_BL: np.ndarray, *, separate_documents: bool, multiple: int = 1) -> TokenRows:
    """The tokens of rows with padding, on the CPU.

    Args:
        segment_BL: integers, 0 in padding, 1, 2, ... in the documents of a row, each of them in one piece.
        separate_documents: a token attends to its document, with positions from 0; else to its row, with columns as
            positions.
        multiple: of which the number of tokens must be one; a divisor of B * L. Padding makes it up, and B * L itself
            keeps all of it, at the end.
    """
    num_rows, length = segment_BL.shape
    segment_G = segment_BL.reshape(-1)
    is_token_G = segment_G > 0
    place_T = np.flatnonzero(is_token_G)
    multiple = _rounded_multiple(multiple, segment_G.size)
    num_tokens = max(1, -(-len(place_T) // multiple)) * multiple
    row_T = place_T // length
    is_first_T = np.ones(len(place_T), np.bool_)
    is_first_T[1:] = row_T[1:] != row_T[:-1]
    if separate_documents:
        segment_T = segment_G[place_T]
        is_first_T[1:] |= (segment_T[1:] != segment_T[:-1]) | (place_T[1:] != place_T[:-1] + 1)
    padding = np.flatnonzero(~is_token_G)[: num_tokens - len(place_T)]
    place_T = np.concatenate([place_T, padding])
    is_first_T = np.concatenate([is_first_T, np.arange(len(padding)) % min(_PADDING_DOCUMENT, length) == 0])
    bound_N1 = np.append(np.flatnonzero(is_first_T), len(place_T))
    length_N = np.diff(bound_N1)
    first_T = np.repeat(bound_N1[:-1], length_N)
    position_T = np.arange(len(place_T)) - first_T if separate_documents else place_T % length
    token_G = np.zeros(segment_G.size, np.int64)
    token_G[place_T] = np.arange(len(place_T))
    return TokenRows(
        num_rows,
        length,
        torch.from_numpy(place_T),
        torch.from_numpy(token_G),
        torch.from_numpy(position_T),
        torch.from_numpy(bound_N1.astype(np.int32)),
        torch.from_numpy(_blocks(bound_N1)),
    )


def _move(part: Tensor | None, device: torch.device, non_blocking: bool) -> Tensor | None:
    if part is None:
        return None
    return (part.pin_memory() if non_blocking else part).to(device, non_blocking=non_blocking)


def _rounded_multiple(multiple: int, num_places: int) -> int:
    """A multiple of `multiple` that products like, if the grid is one of it too."""
    return _MULTIPLE * multiple if num_places % (_MULTIPLE * multiple) == 0 else multiple


def _blocks(bound_N1: np.ndarray) -> np.ndarray:
    """`block_K3` of documents, the longest first, so that no GPU ends with a single long one."""
    first_N, length_N = bound_N1[:-1], np.diff(bound_N1)
    order = np.argsort(-length_N, kind="stable")
    first_N, length_N = first_N[order], length_N[order]
    count_N = -(-length_N // ATTENTION_BLOCK)
    document_K = np.repeat(np.arange(len(count_N)), count_N)
    number_K = np.arange(len(document_K)) - np.repeat(np.cumsum(count_N) - count_N, count_N)
    first_K = first_N[document_K]
    return np.stack([first_K + number_K * ATTENTION_BLOCK, first_K, first_K + length_N[document_K]], axis=1).astype(
        np.int32
    )
