"""From a dataset to its rows: which index a row mode needs, over which documents, and whether it is stored already.

Building the indexes of stream and document is cheaper than looking for a file; the tables of sentence and pack, and the
hashes of documents for splits, are stored beside the data in PREFIX.index (see `index_cache`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import xxhash

from pretrain.config.sections import RowMode
from pretrain.data.dataset.indexed_dataset import IndexedDataset
from pretrain.data.index_cache import Tables, cached
from pretrain.data.sample_index import PackIndex, RowIndex, Rows, SentenceIndex
from pretrain.data.splits import Selection, Split, hash_documents, select
from pretrain.errors import ConfigError, DataError

_MOST_THREADS = 32
_LONGEST: dict[RowMode, int] = {"pack": 2**16, "sentence": 2**24}


def open_rows(
    dataset: IndexedDataset,
    mode: RowMode,
    seq_length: int,
    *,
    split: Split | None = None,
    cache_folder: Path | None = None,
    num_threads: int | None = None,
    must_store: bool = False,
) -> Rows:
    """The rows of `dataset`, or of its documents in `split`.

    Tables are loaded from and stored in PREFIX.index, then `cache_folder`. A dataset without a manifest has nothing to
    identify them by, so its tables stay in memory. `num_threads` defaults to one per available CPU.

    Raises:
        ConfigError: `seq_length` is longer than the row mode supports.
        DataError: `must_store`, and a table cannot be stored.
    """
    if seq_length > _LONGEST.get(mode, seq_length):
        raise ConfigError(f"data.seq_length ({seq_length}) must be at most {_LONGEST[mode]} with data.row_mode={mode}")
    threads = num_threads or min(len(os.sched_getaffinity(0)), _MOST_THREADS)
    store = _Store(dataset, cache_folder, must_store)
    chosen = None if split is None else _select(dataset, split, store, threads)
    offsets = dataset.document_offsets if chosen is None else chosen.offsets
    runs = None if chosen is None else chosen.runs
    facts = {"seq_length": seq_length, "split": None if split is None else [split.first, split.end]}
    if mode == "sentence":
        table = store.get(mode, facts, lambda: _sentence_table(dataset, seq_length, chosen, threads))
        return SentenceIndex(table, seq_length, runs)
    if mode == "pack":
        table = store.get(mode, facts, lambda: PackIndex.build(offsets, seq_length, num_threads=threads))
        return PackIndex(table, seq_length, runs)
    return RowIndex(mode, offsets, seq_length, runs)


class _Store:
    """Stored tables of one dataset."""

    def __init__(self, dataset: IndexedDataset, cache_folder: Path | None, must_store: bool) -> None:
        self._must_store = must_store
        manifest = dataset.manifest
        self._folders = [Path(f"{dataset.prefix}.index"), *([cache_folder] if cache_folder else [])]
        self._prefix, self._content = dataset.prefix, None
        if manifest is not None:
            hashes = "".join((manifest.idx_xxh64, *manifest.bin_xxh64, str(manifest.chunk_bytes), manifest.dtype))
            self._content = xxhash.xxh3_128_hexdigest(hashes.encode())

    def get(self, name: str, facts: Mapping[str, object], make: Callable[[], Tables]) -> Tables:
        if self._content is None and self._must_store:
            raise DataError(f"{self._prefix}.json: is missing, and names what a table was made from; preprocess again")
        if self._content is None:
            return make()
        return cached(name, {**facts, "content": self._content}, make, self._folders, must_store=self._must_store)


def _select(dataset: IndexedDataset, split: Split, store: _Store, threads: int) -> Selection:
    def make() -> Tables:
        return {"hashes": hash_documents(dataset.tokens, dataset.document_offsets, threads)}

    hashes = store.get("hashes", {}, make)["hashes"]
    return select(dataset.document_offsets, split.contains(hashes))


def _sentence_table(dataset: IndexedDataset, seq_length: int, chosen: Selection | None, threads: int) -> Tables:
    kept: np.ndarray | None = None if chosen is None else chosen.is_kept
    return SentenceIndex.build(
        dataset.sequence_lengths, dataset.document_indices, seq_length, is_kept=kept, num_threads=threads
    )
