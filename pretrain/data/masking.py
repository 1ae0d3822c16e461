"""Dynamic masking as a function of (seed, epoch, sample): a typed wrapper of csrc/include/taco/masking.hpp.

A row is masked the same way in whatever rank, micro-batch or resumed run, and differently in every epoch.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from pretrain.data.native import native
from pretrain.errors import ConfigError

Masking = Literal["token", "whole_word", "span"]


def predictions_per_row(mask_rate: float, capacity: int) -> int:
    """Slots for masked tokens in a row of `capacity` tokens between [CLS] and the last [SEP]: rounded, at least 1."""
    return max(1, math.floor(mask_rate * capacity + 0.5))


class Masker:
    """Masks rows with one policy; immutable, so threads may share it."""

    def __init__(
        self,
        *,
        seed: int,
        mask_rate: float,
        masking: Masking,
        mean_span_length: float,
        mask_id: int,
        is_special_V: np.ndarray,
        continues_word_V: np.ndarray | None = None,
    ) -> None:
        """Prepares to mask; `is_special_V` and `continues_word_V` are bool, one entry per piece of the vocabulary.

        Special tokens are never masked and never drawn as replacements. `continues_word_V` is used by whole_word only.

        Raises:
            ConfigError: whole_word without `continues_word_V`, or `continues_word_V` has the wrong length.
            ValueError: a rate outside (0, 1], a mean span length below 1, or no ordinary token to draw.
        """
        if masking == "whole_word":
            _check_word_boundaries(continues_word_V, len(is_special_V))
        self._native = native().Masker(
            seed=seed,
            rate=mask_rate,
            kind=masking,
            mean_span_length=mean_span_length,
            mask_id=mask_id,
            is_special=is_special_V,
            continues_word=continues_word_V if masking == "whole_word" else np.empty(0, np.bool_),
            ordinary_ids=np.flatnonzero(~is_special_V),
        )

    def mask(
        self, input_ids_BL: np.ndarray, *, samples_B: np.ndarray, epochs_B: np.ndarray, num_predictions: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Masks `input_ids_BL` (int64) in place; returns masked_index_M and masked_label_M, M = B * num_predictions.

        Per row, ascending: row * L + column of each chosen token, and its original id; unused slots hold 0 and -100.

        Raises:
            IndexError: a token id is outside the vocabulary.
            ValueError: a row has more tokens to predict than `num_predictions`.
        """
        return self._native.mask_rows(input_ids_BL, samples_B, epochs_B, num_predictions)

    def mask_batch(
        self,
        input_ids_BL: np.ndarray,
        segment_BL: np.ndarray,
        *,
        samples_B: np.ndarray,
        epochs_B: np.ndarray,
        exclude_special: bool,
        out_valid_BL: np.ndarray,
        out_index_M: np.ndarray,
        out_label_M: np.ndarray,
    ) -> None:
        """Like `mask`, into given arrays `out_index_M` and `out_label_M` (int64); their length gives num_predictions.

        `out_valid_BL` (bool) is set where `segment_BL` (int64) is positive, without special tokens if
        `exclude_special`.

        Raises:
            IndexError: a token id is outside the vocabulary.
            ValueError: a row has more tokens to predict than there are slots, or an output has the wrong shape.
        """
        self._native.mask_batch(
            input_ids_BL,
            segment_BL,
            samples_B,
            epochs_B,
            exclude_special=exclude_special,
            out_valid=out_valid_BL,
            out_index=out_index_M,
            out_labels=out_label_M,
        )


def _check_word_boundaries(continues_word_V: np.ndarray | None, vocab_size: int) -> None:
    if continues_word_V is None:
        raise ConfigError(
            "objective.masking=whole_word needs to know which pieces continue a word, but this tokenizer does not "
            "define it; set objective.masking=token or span"
        )
    if len(continues_word_V) != vocab_size:
        raise ConfigError(
            f"objective.masking=whole_word: the tokenizer has {len(continues_word_V)} pieces, the dataset was written "
            f"with {vocab_size}; use the tokenizer that wrote the dataset"
        )
