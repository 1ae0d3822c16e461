"""The one door to the C++ extension `pretrain.data._native`, and the typed face of its sample index.

It stands between the datasets on disk and the batches: it says how many rows a dataset gives, where each begins, and
fills them. The contracts are written in csrc/include/taco; this module adds types and the words for a missing build.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from pretrain.config import RowMode
from pretrain.errors import MissingExtensionError


@cache
def native() -> Any:
    """The extension module, imported at the first call.

    Raises:
        MissingExtensionError: it has not been built for this interpreter; names both and the command that builds it.
    """
    try:
        return importlib.import_module("pretrain.data._native")
    except ImportError as error:
        raise MissingExtensionError(
            f"the C++ extension pretrain.data._native cannot be loaded by {sys.executable} ({error}); build it in the "
            "project's root with `python -m pip install -e . --no-build-isolation` "
            "or `python setup.py build_ext --inplace`"
        ) from error


@dataclass(frozen=True)
class RowIds:
    """Token ids that frame a row, and the vocabulary size that every token must stay below."""

    vocab_size: int
    cls: int
    sep: int
    pad: int


class RowIndex:
    """Where the rows of one dataset begin; 8 bytes per document (16 in document mode), nothing per row."""

    def __init__(self, mode: RowMode, document_offsets: np.ndarray, seq_length: int) -> None:
        """Indexes documents whose first tokens, and the end, are `document_offsets` (int64 [num_documents + 1]).

        Raises:
            ValueError: offsets that are negative or decrease, or a `seq_length` below 3.
        """
        self._native = native().RowIndex(mode, document_offsets, seq_length)
        self.seq_length = seq_length
        self.num_rows: int = self._native.num_rows
        # Tokens, separators included, after the last complete row of stream mode.
        self.num_left_out: int = self._native.num_left_out
        self.memory_bytes: int = self._native.memory_bytes

    def first_tokens(self, rows: np.ndarray) -> np.ndarray:
        """Position in the token array of the first token at or after the beginning of each row; int64 [n]."""
        return self._native.first_tokens(rows)

    def fill(
        self, tokens: np.ndarray, rows: np.ndarray, ids: RowIds, *, out_ids: np.ndarray, out_segment: np.ndarray
    ) -> None:
        """Writes rows `rows` (int64 [n]) to `out_ids` and `out_segment`, int64 [n, seq_length] each.

        Raises:
            IndexError: a row outside the index, or a token id outside the vocabulary.
            ValueError: `tokens` is shorter than the index needs, or an output has another shape.
        """
        self._native.fill(
            tokens,
            rows,
            vocab_size=ids.vocab_size,
            cls=ids.cls,
            sep=ids.sep,
            pad=ids.pad,
            out_ids=out_ids,
            out_segment=out_segment,
        )
