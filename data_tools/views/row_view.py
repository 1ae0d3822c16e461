"""One training row, token by token: inputs of the model, labels, and the pairs that TACO compares.

Everything comes from the functions that training calls (`open_batches`, `sample_pairs`), so a view cannot differ from
training. Shape letters: B rows of the micro-batch, L tokens of a row, K negatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import numpy as np

from pretrain.config.sections import RunConfig
from pretrain.data.batches import Batch, RowSource, open_batches
from pretrain.data.order import walk
from pretrain.data.tokenizer.load import Tokenizer
from pretrain.errors import ConfigError

Kind = Literal["text", "special", "padding", "masked", "random", "kept"]

# Positions of the order looked up at once when searching for a row.
_PIECE = 1 << 20
_DEFAULT_ANCHORS = 3


@dataclass(frozen=True)
class Token:
    """A position of a row: `id` as the model sees it, `label` the id before masking (equal if not masked)."""

    column: int
    id: int
    piece: str
    label: int
    label_piece: str
    kind: Kind
    document: int  # of the row, from 1; 0 in padding
    continues_word: bool


@dataclass(frozen=True)
class Other:
    """A token that an anchor is compared with: row of the micro-batch, column, and the model's input id and piece."""

    row: int
    column: int
    id: int
    piece: str


@dataclass(frozen=True)
class Anchor:
    """A token of the row with its positive and negatives; without a positive no pair is compared."""

    column: int
    piece: str
    is_anchor: bool
    positive: Other | None
    negatives: tuple[Other, ...]


@dataclass(frozen=True)
class RowView:
    """Row `row` of the datasets in epoch `epoch`, which is row `place` of micro-batch `micro_batch`.

    `anchors` is None if pairs could not be drawn because torch is not installed.
    """

    row: int
    epoch: int
    micro_batch: int
    place: int
    tokens: tuple[Token, ...]
    anchors: tuple[Anchor, ...] | None


def find_place(
    config: RunConfig, rows: RowSource, row: int, epoch: int, on_progress: Callable[[int], None] = lambda places: None
) -> tuple[int, int]:
    """The micro-batch of the run in which `row` is used in `epoch`, and its place there.

    Raises:
        ConfigError: there is no such row, or the datasets are blended.
    """
    if not 0 <= row < rows.num_rows:
        raise ConfigError(
            f"--row {row}: in row mode {config.data.row_mode} with data.seq_length={rows.seq_length} there are "
            f"{rows.num_rows} rows, 0 to {rows.num_rows - 1}"
        )
    if config.data.weights is not None:
        raise ConfigError("--row: with data.weights rows have no fixed place in an epoch; name one by --micro-batch")
    begin = epoch * rows.num_rows
    for first in range(begin, begin + rows.num_rows, _PIECE):
        positions = np.arange(first, min(first + _PIECE, begin + rows.num_rows), dtype=np.int64)
        _, samples = walk(config.run.seed, positions, rows.num_rows, shuffle=True)
        matches = np.flatnonzero(samples == row)
        if matches.size:
            return divmod(first + int(matches[0]), config.train.micro_batch_size)
        on_progress(len(positions))
    raise AssertionError(f"row {row} is not in the order of epoch {epoch}")


def view_row(
    config: RunConfig,
    rows: RowSource,
    tokenizer: Tokenizer,
    micro_batch: int,
    place: int,
    anchors: Sequence[int] | None,
) -> RowView:
    """The row at `place` of `micro_batch`, with the pairs of the tokens in the columns `anchors` (None: a few of them).

    Only pairs need torch. If it is not installed, the view has none, unless `anchors` requests them.

    Raises:
        ConfigError: an anchor is outside the row, or the place outside the micro-batch.
        DataError: a token id on disk is not in the vocabulary.
        ModuleNotFoundError: `anchors` are requested, but torch is not installed.
    """
    size = config.train.micro_batch_size
    if not 0 <= place < size:
        raise ConfigError(f"--place {place}: train.micro_batch_size is {size}, so places are 0 to {size - 1}")
    wrong = [column for column in anchors or () if not 0 <= column < rows.seq_length]
    if wrong:
        raise ConfigError(f"--anchor {wrong[0]}: a row has columns 0 to {rows.seq_length - 1}")
    source = open_batches(config, rows, seed=config.run.seed, weights=config.data.weights)
    batch = source.micro_batch(micro_batch)
    epochs, samples = source.walk(np.array([micro_batch * size + place], np.int64))
    tokens = _tokens(rows, tokenizer, batch, place)
    pairs: tuple[Anchor, ...] | None = None
    if not config.is_contrastive:
        pairs = ()
    elif anchors is not None or find_spec("torch") is not None:
        pairs = _anchors(config, tokenizer, batch, place, tokens, anchors)
    return RowView(int(samples[0]), int(epochs[0]), micro_batch, place, tokens, pairs)


def _tokens(rows: RowSource, tokenizer: Tokenizer, batch: Batch, place: int) -> tuple[Token, ...]:
    length, special = rows.seq_length, tokenizer.special
    label_L = batch.input_ids_BL[place].copy()
    is_used_M = (batch.masked_label_M >= 0) & (batch.masked_index_M // length == place)
    chosen = batch.masked_index_M[is_used_M] % length
    label_L[chosen] = batch.masked_label_M[is_used_M]
    is_chosen_L = np.zeros(length, np.bool_)
    is_chosen_L[chosen] = True
    is_special, continues = set(tokenizer.special_ids()) - {special.unk}, tokenizer.continues_word()
    document_L = _documents(batch.segment_BL[place], label_L, special.sep)

    def kind(column: int, token_id: int, label: int) -> Kind:
        if is_chosen_L[column]:
            return "masked" if token_id == special.mask else "kept" if token_id == label else "random"
        if batch.segment_BL[place, column] == 0:
            return "padding"
        return "special" if label in is_special else "text"

    return tuple(
        Token(
            column,
            token_id,
            tokenizer.piece(token_id),
            label,
            tokenizer.piece(label),
            kind(column, token_id, label),
            int(document_L[column]),
            bool(continues[label]),
        )
        for column, (token_id, label) in enumerate(
            zip(batch.input_ids_BL[place].tolist(), label_L.tolist(), strict=True)
        )
    )


def _documents(segment_L: np.ndarray, label_L: np.ndarray, sep: int) -> np.ndarray:
    """Document numbers of a row: its segments, or, if it is a single segment, the parts between separators."""
    if segment_L.max(initial=0) > 1:
        return segment_L
    is_border_L = np.concatenate(([0], label_L[:-1] == sep))
    return np.where(segment_L > 0, 1 + np.cumsum(is_border_L), 0)


def _anchors(
    config: RunConfig,
    tokenizer: Tokenizer,
    batch: Batch,
    place: int,
    tokens: Sequence[Token],
    columns: Sequence[int] | None,
) -> tuple[Anchor, ...]:
    import torch

    from pretrain.objectives.taco import anchor_mask, sample_pairs

    valid_BL, segment_BL = torch.from_numpy(batch.valid_BL), torch.from_numpy(batch.segment_BL)
    positive_BL, negative_BLK = sample_pairs(
        valid_BL,
        window=config.objective.positive_window,
        num_negatives=config.objective.num_negatives,
        seed=config.run.seed,
        micro_batch_index=batch.micro_batch_index,
        segment_BL=segment_BL,
    )
    is_masked = [token.kind in ("masked", "random", "kept") for token in tokens]
    may_be = anchor_mask(config.objective.anchors, torch.tensor(is_masked), valid_BL[place]).tolist()
    length = len(tokens)

    def other(row: int, column: int) -> Other:
        token_id = int(batch.input_ids_BL[row, column])
        return Other(row, column, token_id, tokenizer.piece(token_id))

    def anchor(column: int) -> Anchor:
        positive = int(positive_BL[place, column])
        negatives = [number for number in negative_BLK[place, column].tolist() if number >= 0]
        return Anchor(
            column,
            tokens[column].piece,
            may_be[column] and positive >= 0 and bool(negatives),
            other(place, positive) if positive >= 0 else None,
            tuple(other(*divmod(number, length)) for number in negatives),
        )

    return tuple(anchor(column) for column in (_spread(may_be) if columns is None else columns))


def _spread(may_be: Sequence[bool]) -> list[int]:
    """A few anchors, evenly spread over those of the row."""
    columns = [column for column, is_anchor in enumerate(may_be) if is_anchor]
    count = min(_DEFAULT_ANCHORS, len(columns))
    return [columns[(2 * number + 1) * len(columns) // (2 * count)] for number in range(count)]
