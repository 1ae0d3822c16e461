"""Floating-point operations of training, a pure function of configuration and counts; imports no torch.

Counted as Megatron-LM does (Narayanan et al. 2021, appendix): two operations per multiplication of the matrix products,
backward twice as much as forward. The vocabulary head works on the masked tokens alone; the contrastive loss, softmax,
norms and the optimizer count nothing.

    model operations     what the objective needs: real tokens, each attending to its document or row, nothing twice.
                         Over time and peak they give the MFU (model FLOPs utilisation).
    hardware operations  what is carried out: also layers that are recomputed in backward, unused predictions, and
                         padding where it is computed (pipelines).
                         Over time and peak they give the HFU (hardware FLOPs utilisation).

Neither counts, as is usual, that an attention kernel recomputes its weights in backward or masks part of what it has
computed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pretrain.config.sections import RunConfig
from pretrain.data.masking import predictions_per_row
from pretrain.planner.vocabulary import padded_vocab_size


@dataclass(frozen=True)
class TokenCounts:
    """What of some rows goes into matrix products.

    Attributes:
        tokens: that are not padding.
        pairs: of a token and one that it attends to: the sum of squared lengths of what is attended to as a whole.
        labels: masked tokens to predict.
        places: tokens that the layers compute, with padding if they compute it.
        label_places: predictions, with those that are unused.
    """

    tokens: int = 0
    pairs: int = 0
    labels: int = 0
    places: int = 0
    label_places: int = 0

    def __add__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class StepFlops:
    """Operations of the whole model, forward and backward."""

    model: float
    hardware: float


def full_rows(config: RunConfig, num_rows: int) -> TokenCounts:
    """The counts of rows without padding, each one document and with all its predictions: those of row_mode=stream."""
    length = config.data.seq_length
    labels = num_rows * predictions_per_row(config.objective.mask_rate, length - 2)
    places, pairs = num_rows * length, num_rows * length**2
    return TokenCounts(places, pairs, labels, places, labels)


def count_rows(
    segment_BL: np.ndarray, label_M: np.ndarray, *, by_document: bool, computes_padding: bool = False
) -> TokenCounts:
    """The counts of a micro-batch.

    Args:
        segment_BL: the number of the document of each token in its row, 0 in padding.
        label_M: the word of each masked token, negative in unused entries.
        by_document: tokens attend to their own document (row_mode=pack); otherwise to all tokens of their row.
        computes_padding: the layers compute padding too.
    """
    lengths = _document_lengths(segment_BL) if by_document else np.count_nonzero(segment_BL, axis=1)
    tokens = int(lengths.sum())
    return TokenCounts(
        tokens=tokens,
        pairs=int(np.dot(lengths, lengths)),
        labels=int(np.count_nonzero(label_M >= 0)),
        places=segment_BL.size if computes_padding else tokens,
        label_places=len(label_M),
    )


def _document_lengths(segment_BL: np.ndarray) -> np.ndarray:
    """Tokens of each document of each row, which lies there in one piece; int64."""
    is_start_BL = np.ones(segment_BL.shape, np.bool_)
    np.not_equal(segment_BL[:, 1:], segment_BL[:, :-1], out=is_start_BL[:, 1:])
    starts = np.flatnonzero(is_start_BL)
    return np.diff(starts, append=segment_BL.size)[segment_BL.ravel()[starts] > 0]


def step_flops(config: RunConfig, vocab_size: int, counts: TokenCounts) -> StepFlops:
    """Operations for rows with these counts, forward and backward, on all devices that share them."""
    encoder, head = _forward(config, vocab_size, counts.tokens, counts.pairs, counts.labels)
    num_columns = padded_vocab_size(vocab_size, config.parallel.tensor)
    all_encoder, all_head = _forward(config, num_columns, counts.places, counts.pairs, counts.label_places)
    recomputed = all_encoder * config.recompute_layers / config.model.num_layers
    return StepFlops(model=3 * (encoder + head), hardware=3 * (all_encoder + all_head) + recomputed)


def model_flops(config: RunConfig, vocab_size: int) -> float:
    """Model operations of one micro-batch of full rows, forward and backward."""
    return step_flops(config, vocab_size, full_rows(config, config.train.micro_batch_size)).model


def _forward(config: RunConfig, vocab_size: int, tokens: int, pairs: int, labels: int) -> tuple[float, float]:
    """Operations of the forward pass: of the encoder layers, and of the vocabulary head with its transform."""
    size, inner = config.model.hidden_size, config.model.ffn_hidden_size
    encoder = config.model.num_layers * (tokens * (8 * size**2 + 4 * size * inner) + pairs * 4 * size)
    return float(encoder), float(labels * (2 * size**2 + 2 * size * vocab_size))


def add_counts(counts: Iterable[TokenCounts]) -> TokenCounts:
    """The sum."""
    return sum(counts, TokenCounts())
