"""A typed wrapper of the C++ sample index.

Between the datasets on disk and the batches: how many rows a dataset gives, where each begins, and filling them. The
contracts are in csrc/include/taco; this module adds types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pretrain.config.sections import RowMode
from pretrain.data.native import native


@dataclass(frozen=True)
class RowIds:
    """Token ids that frame a row, and the vocabulary size, which every token id must be below."""

    vocab_size: int
    cls: int
    sep: int
    pad: int


@dataclass(frozen=True)
class TokenRuns:
    """Where a split's documents are: positions among the split's tokens -> tokens of the dataset; int64 [runs] each."""

    places: np.ndarray
    tokens: np.ndarray

    def to_tokens(self, places: np.ndarray) -> np.ndarray:
        """Positions in the dataset's tokens of `places` (int64 [n]) among the split's tokens."""
        run = np.searchsorted(self.places, places, side="right") - 1
        return self.tokens[run] + (places - self.places[run])


class Rows:
    """The rows of one dataset, or of a split of it; the common part of all row modes' indexes.

    Attributes:
        seq_length: tokens per row, padding included.
        num_rows, num_tokens: rows, and tokens of the documents in them.
        num_left_out: tokens, separators included, after the last complete row of stream mode.
        num_filled: positions of all rows that hold a token, special ones included.
        memory_bytes: of the index; nothing else is stored per row.
    """

    num_left_out = 0

    def __init__(self, native_index: Any, seq_length: int, runs: TokenRuns | None) -> None:
        self._native, self._runs = native_index, runs
        self._map = {} if runs is None else {"places": runs.places, "run_tokens": runs.tokens}
        self.seq_length = seq_length
        self.num_rows: int = native_index.num_rows
        self.num_tokens = 0
        self.num_filled = 0
        self.memory_bytes = 0 if runs is None else runs.places.nbytes + runs.tokens.nbytes

    def first_tokens(self, rows: np.ndarray) -> np.ndarray:
        """Position in the token array of the first token at or after the beginning of each row; int64 [n]."""
        places = self._native.first_tokens(rows)
        return places if self._runs is None else self._runs.to_tokens(places)

    def fill(
        self, tokens: np.ndarray, rows: np.ndarray, ids: RowIds, *, out_ids: np.ndarray, out_segment: np.ndarray
    ) -> None:
        """Writes rows `rows` (int64 [n]) to `out_ids` and `out_segment`, int64 [n, seq_length] each.

        Segments are 0 in padding and number the documents of a packed row 1, 2, 3, ...; in other modes they are 1.

        Raises:
            IndexError: a row is outside the index, or a token id outside the vocabulary.
            ValueError: `tokens` is shorter than the index needs, or an output has the wrong shape.
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
            **self._map,
        )


class RowIndex(Rows):
    """Row modes stream and document; 8.5 bytes per document (16.5 in document mode), nothing per row."""

    def __init__(
        self, mode: RowMode, document_offsets: np.ndarray, seq_length: int, runs: TokenRuns | None = None
    ) -> None:
        """Indexes documents by their `document_offsets`: first tokens, then the end (int64 [num_documents + 1]).

        Raises:
            ValueError: offsets are negative or decrease, or `seq_length` is below 3.
        """
        super().__init__(native().RowIndex(mode, document_offsets, seq_length), seq_length, runs)
        self.num_left_out: int = self._native.num_left_out
        self.num_tokens = int(document_offsets[-1] - document_offsets[0])
        places = self.num_rows * seq_length
        self.num_filled = places if mode == "stream" else self.num_tokens + 2 * self.num_rows
        self.memory_bytes += self._native.memory_bytes


class SentenceIndex(Rows):
    """Row mode sentence; 4.03 bytes per row, in arrays that may be mapped."""

    @staticmethod
    def build(
        sequence_lengths: np.ndarray,
        document_indices: np.ndarray,
        seq_length: int,
        *,
        is_kept: np.ndarray | None = None,
        num_threads: int = 1,
    ) -> dict[str, np.ndarray]:
        """The table of a dataset's int32 `sequence_lengths` and int64 `document_indices`, as in its .idx file.

        `is_kept` (bool, one per document) selects documents; the table is the same for any `num_threads`.

        Raises:
            ValueError: a length is negative, indices decrease or are out of range, or `seq_length` is outside 3..2^24.
        """
        builder = native().SentenceTableBuilder(seq_length)
        kept = np.empty(0, np.bool_) if is_kept is None else is_kept
        builder.add(sequence_lengths, document_indices, kept, num_threads)
        num_tokens = np.array([builder.num_tokens], np.int64)
        bases, starts = builder.finish()
        return {"bases": bases, "starts": starts, "num_tokens": num_tokens}

    def __init__(self, table: Mapping[str, np.ndarray], seq_length: int, runs: TokenRuns | None = None) -> None:
        """Opens a table from `build` with the same `seq_length`.

        Raises:
            ValueError: the arrays are inconsistent.
        """
        num_tokens = int(table["num_tokens"][0])
        native_index = native().SentenceIndex(table["bases"], table["starts"], num_tokens, seq_length)
        super().__init__(native_index, seq_length, runs)
        self.num_tokens = num_tokens
        self.num_filled = num_tokens + 2 * self.num_rows
        self.memory_bytes += sum(array.nbytes for array in table.values())


class PackIndex(Rows):
    """Row mode pack; 6 bytes per piece of a document and 4 per row, in arrays that may be mapped."""

    @staticmethod
    def build(document_offsets: np.ndarray, seq_length: int, *, num_threads: int = 1) -> dict[str, np.ndarray]:
        """The table of documents at `document_offsets` (int64 [n + 1]); the same for any `num_threads`.

        Raises:
            ValueError: offsets are negative or decrease, or `seq_length` is outside 3 .. 65536.
        """
        names = ("windows", "row_pieces", "piece_starts", "piece_lengths")
        return dict(zip(names, native().pack_table(document_offsets, seq_length, num_threads), strict=True))

    def __init__(self, table: Mapping[str, np.ndarray], seq_length: int, runs: TokenRuns | None = None) -> None:
        """Opens a table from `build` with the same `seq_length`.

        Raises:
            ValueError: the arrays are inconsistent.
        """
        super().__init__(native().PackIndex(**table, seq_length=seq_length), seq_length, runs)
        self.num_tokens = int(table["windows"][-1, 2] - table["windows"][0, 2])
        self.num_filled = self.num_tokens + 2 * len(table["piece_starts"])
        self.memory_bytes += sum(array.nbytes for array in table.values())
