"""Micro-batches: rows of datasets, in the order of the stream, masked; a pure function of the micro-batch's number.

    micro_batch * B + row = position -> (order) epoch, sample -> (sample_index) token ids -> (masking) masked token ids

Nothing here keeps state, so ranks, threads and resumed runs may read any micro-batch in any order and get the same one.
Shape letters: B rows of a micro-batch, L tokens of a row, M = B * P masked positions, P per row, V vocabulary.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from pretrain.config.sections import RowMode, RunConfig
from pretrain.data.dataset.indexed_dataset import IndexedDataset
from pretrain.data.masking import Masker, Masking, predictions_per_row
from pretrain.data.order import Blend, walk
from pretrain.data.row_modes import open_rows
from pretrain.data.sample_index import RowIds, Rows
from pretrain.data.special_ids import special_ids
from pretrain.data.splits import Split, split_named
from pretrain.data.tokenizer.info import TokenizerInfo
from pretrain.errors import DataError, counted

# Number of bytes -> uint8 array of that length, uninitialised, aligned for int64.
Allocate = Callable[[int], np.ndarray]


def ordinary_memory(num_bytes: int) -> np.ndarray:
    """Memory from NumPy, uint8 [num_bytes]."""
    return np.empty(num_bytes, np.uint8)


@dataclass(frozen=True)
class Batch:
    """One micro-batch, NumPy; `micro_batch_index` is global and keys TACO pairs and dropout."""

    input_ids_BL: np.ndarray  # int64, after masking
    segment_BL: np.ndarray  # int64, 0 in padding, else the number of the document in its row: 1, 2, ...
    valid_BL: np.ndarray  # bool, may take part in the contrastive loss
    masked_index_M: np.ndarray  # int64, row * L + column; 0 where unused
    masked_label_M: np.ndarray  # int64, the id before masking; -100 where unused
    micro_batch_index: int

    @property
    def num_labels(self) -> int:
        """How many masked tokens it has to predict."""
        return int(np.count_nonzero(self.masked_label_M >= 0))

    @property
    def num_rows(self) -> int:
        """How many of its rows count: those with tokens for the contrastive loss, or to predict."""
        has_label_B = (self.masked_label_M.reshape(len(self.valid_BL), -1) >= 0).any(axis=1)
        return int(np.count_nonzero(self.valid_BL.any(axis=1) | has_label_B))

    def counting_rows(self, num_rows: int) -> Batch:
        """A copy in which only the first `num_rows` rows have labels, and tokens for the contrastive loss."""
        valid_BL, label_M = self.valid_BL.copy(), self.masked_label_M.copy()
        valid_BL[num_rows:] = False
        label_M.reshape(len(valid_BL), -1)[num_rows:] = -100
        return replace(self, valid_BL=valid_BL, masked_label_M=label_M)


class RowSource:
    """Rows of one or several datasets, one dataset after another; all written with the same tokenizer.

    Attributes:
        datasets, indexes: one per prefix, in the order given.
        starts: first row of each dataset, then the total; int64 [datasets + 1].
        tokenizer: of all datasets.
        seq_length, capacity: tokens of a row, and those between [CLS] and the last [SEP].
        num_rows, num_tokens, num_left_out: totals; left out are the tokens after the last complete row of a dataset.
        fill_rate: share of all rows' positions that hold a token.
    """

    def __init__(
        self,
        prefixes: Sequence[str | Path],
        row_mode: RowMode,
        seq_length: int,
        *,
        split: Split | None = None,
        cache_folder: Path | None = None,
    ) -> None:
        """Opens and indexes every dataset, or its documents in `split`; `cache_folder` as in `open_rows`.

        Raises:
            DataError: a dataset is damaged, has no manifest, another tokenizer or no complete row.
        """
        self.seq_length, self.capacity = seq_length, seq_length - 2
        self.datasets = [IndexedDataset(prefix) for prefix in prefixes]
        self.tokenizer = _common_tokenizer(self.datasets)
        self.indexes = [
            open_rows(dataset, row_mode, seq_length, split=split, cache_folder=cache_folder)
            for dataset in self.datasets
        ]
        for dataset, index in zip(self.datasets, self.indexes, strict=True):
            if index.num_rows == 0:
                raise DataError(_explain_no_row(dataset, index, row_mode, split))
        self.starts = np.cumsum([0, *(index.num_rows for index in self.indexes)], dtype=np.int64)
        self.num_rows = int(self.starts[-1])
        self.num_tokens = sum(index.num_tokens for index in self.indexes)
        self.num_left_out = sum(index.num_left_out for index in self.indexes)
        self.fill_rate = sum(index.num_filled for index in self.indexes) / (self.num_rows * seq_length)
        special = self.tokenizer.special
        self._ids = RowIds(self.tokenizer.vocab_size, special.cls, special.sep, special.pad)

    def fill(self, rows_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """input_ids_BL and segment_BL (int64) of rows `rows_B` (int64, 0 <= row < num_rows), unmasked.

        Raises:
            DataError: a token id on disk is not in the vocabulary.
        """
        ids_BL, segment_BL = (np.empty((len(rows_B), self.seq_length), np.int64) for _ in range(2))
        self.fill_into(rows_B, out_ids=ids_BL, out_segment=segment_BL)
        return ids_BL, segment_BL

    def fill_into(self, rows_B: np.ndarray, *, out_ids: np.ndarray, out_segment: np.ndarray) -> None:
        """Like `fill`, into given arrays: int64 [len(rows_B), seq_length] each.

        Raises:
            DataError: a token id on disk is not in the vocabulary.
        """
        if rows_B.size and not 0 <= rows_B.min() <= rows_B.max() < self.num_rows:
            raise IndexError(f"rows {rows_B.min()} to {rows_B.max()} of {self.num_rows}")
        if len(self.datasets) == 1:
            self._fill_from(0, rows_B, out_ids, out_segment)
            return
        owners_B = np.searchsorted(self.starts, rows_B, side="right") - 1
        for owner in np.unique(owners_B):
            places = np.flatnonzero(owners_B == owner)
            ids, segment = (np.empty((len(places), self.seq_length), np.int64) for _ in range(2))
            self._fill_from(int(owner), rows_B[places] - self.starts[owner], ids, segment)
            out_ids[places], out_segment[places] = ids, segment

    def _fill_from(self, owner: int, rows: np.ndarray, out_ids: np.ndarray, out_segment: np.ndarray) -> None:
        dataset = self.datasets[owner]
        try:
            self.indexes[owner].fill(dataset.tokens, rows, self._ids, out_ids=out_ids, out_segment=out_segment)
        except IndexError as error:
            raise DataError(
                f"{dataset.bin_path}: {error}; `taco data verify {dataset.prefix}` says whether the file is damaged"
            ) from None


class BatchSource:
    """Masked micro-batches from one row source; `micro_batch` is a pure function, safe to call from any thread."""

    def __init__(
        self,
        rows: RowSource,
        *,
        micro_batch_size: int,
        seed: int,
        mask_rate: float,
        masking: Masking,
        mean_span_length: float,
        exclude_special: bool,
        shuffle: bool,
        continues_word: np.ndarray | None = None,
        weights: Sequence[float] | None = None,
        allocate: Allocate = ordinary_memory,
    ) -> None:
        """Prepares to serve micro-batches of `micro_batch_size` rows.

        `exclude_special` keeps special tokens out of `valid_BL`; whole_word needs `continues_word` (bool [V]);
        `weights`, one per dataset, blends the datasets (without: every row once per epoch); `allocate` returns the
        memory of each batch, for example page-locked memory, which a GPU can read directly.

        Raises:
            ConfigError: whole_word masking without word boundaries that match the datasets' vocabulary.
            DataError: the vocabulary has only special tokens, or PREFIX.tokenizer is not the dataset's tokenizer.
        """
        self.rows, self.micro_batch_size, self._allocate = rows, micro_batch_size, allocate
        self.num_predictions = predictions_per_row(mask_rate, rows.capacity)
        self._seed, self._shuffle, self._exclude_special = seed, shuffle, exclude_special
        num_rows = np.diff(rows.starts).tolist()
        self.blend = None if weights is None else Blend(seed, weights, num_rows, shuffle=shuffle)
        special = rows.tokenizer.special
        self._is_special_V = np.zeros(rows.tokenizer.vocab_size, np.bool_)
        self._is_special_V[special_ids([dataset.prefix for dataset in rows.datasets], rows.tokenizer)] = True
        if self._is_special_V.all():
            raise DataError(
                f"tokenizer {rows.tokenizer.name}: all its {rows.tokenizer.vocab_size} tokens are special ones, so "
                "there is nothing to predict; use a vocabulary that has words (`taco data train-tokenizer`)"
            )
        self._masker = Masker(
            seed=seed,
            mask_rate=mask_rate,
            masking=masking,
            mean_span_length=mean_span_length,
            mask_id=special.mask,
            is_special_V=self._is_special_V,
            continues_word_V=continues_word,
        )

    def micro_batch(self, index: int) -> Batch:
        """Micro-batch `index` (0 or more) of the endless stream; the stream wraps around at the end of each epoch.

        Raises:
            DataError: a token id on disk is not in the vocabulary.
        """
        first = index * self.micro_batch_size
        positions_B = np.arange(first, first + self.micro_batch_size, dtype=np.int64)
        epochs_B, samples_B = self.walk(positions_B)
        ids_BL, segment_BL, valid_BL, index_M, label_M = self._new_arrays()
        self.rows.fill_into(samples_B, out_ids=ids_BL, out_segment=segment_BL)
        self._masker.mask_batch(
            ids_BL,
            segment_BL,
            samples_B=samples_B,
            epochs_B=epochs_B,
            exclude_special=self._exclude_special,
            out_valid_BL=valid_BL,
            out_index_M=index_M,
            out_label_M=label_M,
        )
        return Batch(ids_BL, segment_BL, valid_BL, index_M, label_M, index)

    def walk(self, positions_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epoch and row at positions of the endless stream (int64, 0 or more); in a blend, the dataset's epoch."""
        if self.blend is None:
            return walk(self._seed, positions_B, self.rows.num_rows, shuffle=self._shuffle)
        datasets_B, epochs_B, rows_B = self.blend.look_up(positions_B)
        return epochs_B, self.rows.starts[datasets_B] + rows_B

    def _new_arrays(self) -> tuple[np.ndarray, ...]:
        """The five arrays of a batch, in one block: one allocation and one deallocation."""
        shape_BL = (self.micro_batch_size, self.rows.seq_length)
        num_tokens, num_places = math.prod(shape_BL), self.micro_batch_size * self.num_predictions
        block = self._allocate(16 * (num_tokens + num_places) + num_tokens)
        numbers, rest = block[: 16 * num_tokens].view(np.int64), block[16 * num_tokens :]
        return (
            numbers[:num_tokens].reshape(shape_BL),
            numbers[num_tokens:].reshape(shape_BL),
            rest[16 * num_places :].view(np.bool_).reshape(shape_BL),
            rest[: 8 * num_places].view(np.int64),
            rest[8 * num_places : 16 * num_places].view(np.int64),
        )


def open_source(config: RunConfig, name: Literal["train", "validation"]) -> RowSource:
    """The training or validation rows of a run: of data.train or data.validation, or of a split of data.train.

    Raises:
        DataError: as for `RowSource`.
    """
    data = config.data
    split = split_named(data.splits, name) if data.splits else None
    prefixes = data.train if name == "train" or split else data.validation
    return RowSource(prefixes, data.row_mode, data.seq_length, split=split, cache_folder=data.index_cache)


def open_batches(
    config: RunConfig,
    rows: RowSource,
    *,
    seed: int,
    weights: Sequence[float] | None = None,
    allocate: Allocate = ordinary_memory,
) -> BatchSource:
    """The micro-batches of `rows` that a run with this configuration trains on; tools that inspect them use this, too.

    `weights` are data.weights for training rows, None for validation rows.

    Raises:
        ConfigError: whole_word masking with a tokenizer whose word boundaries do not match the vocabulary.
        DataError: whole_word masking without the tokenizer's folder beside the first dataset.
    """
    objective = config.objective
    return BatchSource(
        rows,
        micro_batch_size=config.train.micro_batch_size,
        seed=seed,
        mask_rate=objective.mask_rate,
        masking=objective.masking,
        mean_span_length=objective.mean_span_length,
        exclude_special=objective.exclude_special,
        shuffle=True,
        continues_word=_continues_word(config) if objective.masking == "whole_word" else None,
        weights=weights,
        allocate=allocate,
    )


def _continues_word(config: RunConfig) -> np.ndarray:
    """Which pieces continue a word, from the tokenizer that preprocessing saved beside the data."""
    from pretrain.data.tokenizer.load import load_tokenizer  # here, because it imports the tokenizer libraries

    return load_tokenizer(f"{config.data.train[0]}.tokenizer").continues_word()


def prefetch(source: BatchSource, indices: Iterable[int], depth: int) -> Generator[Batch, None, None]:
    """Micro-batches `indices` in order, up to `depth` of them prepared ahead in one thread (0: none, no thread).

    An exception in the thread is raised here, when its micro-batch is due. Closing the iterator ends the thread.
    """
    if depth == 0:
        yield from map(source.micro_batch, indices)
        return
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="taco-data")
    ahead: deque[Future[Batch]] = deque()
    try:
        for index in indices:
            ahead.append(executor.submit(source.micro_batch, index))
            if len(ahead) > depth:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _common_tokenizer(datasets: Sequence[IndexedDataset]) -> TokenizerInfo:
    with_info: list[tuple[IndexedDataset, TokenizerInfo]] = []
    for dataset in datasets:
        if dataset.manifest is None:
            raise DataError(
                f"{dataset.prefix}.json: no such manifest, so the tokenizer of the dataset is unknown; "
                "write the dataset with `taco data preprocess`"
            )
        with_info.append((dataset, dataset.manifest.tokenizer))
    if not with_info:
        raise DataError("no dataset: give at least one prefix, for example 'data.train=[data/books]'")
    first, tokenizer = with_info[0]
    for dataset, other in with_info[1:]:
        if replace(other, name=tokenizer.name) != tokenizer:  # a copy of a vocabulary may have another name
            raise DataError(
                f"{dataset.prefix} and {first.prefix} were written with different tokenizers: "
                f"{_differences(other, tokenizer)}; preprocess both with the same tokenizer"
            )
    return tokenizer


def _differences(one: TokenizerInfo, other: TokenizerInfo) -> str:
    fields, other_fields = asdict(one), asdict(other)
    return ", ".join(
        f"{key} {fields[key]} and {other_fields[key]}" for key in fields if fields[key] != other_fields[key]
    )


def _explain_no_row(dataset: IndexedDataset, index: Rows, row_mode: RowMode, split: Split | None) -> str:
    remedies = ["data.row_mode=document"] if row_mode == "stream" and index.num_tokens else []
    if index.num_tokens > 1:
        remedies.insert(0, "a smaller data.seq_length")
    where = "" if split is None else f" (data.splits.{split.name}: {split.first:g} to {split.end:g} of them)"
    return (
        f"{dataset.prefix}: {counted(index.num_tokens, 'token')} in "
        f"{counted(dataset.num_documents, 'document')}{where} give no complete row "
        f"of data.seq_length ({index.seq_length}) in row mode {row_mode}; use {', '.join([*remedies, 'more data'])}"
    )
