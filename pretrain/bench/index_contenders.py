"""The contenders of `taco bench index`, each in its own process: this project's indexes and megatron-core's.

Each answers with CPU seconds and bytes per row (or per look-up). Those that should agree with a plain or third-party
version are compared with it on a smaller input, untimed.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.bench.contest import peak_bytes, seconds_per_call, versions
from pretrain.bench.synthetic import document_offsets, document_starts, sentence_lengths

SEQ_LENGTH = 512
SEED = 1234
NUM_BLENDED = 8
_CHECKED_DOCUMENTS = 20_000
_LOOK_UPS = 1 << 16  # order look-ups per call: as many as some thousand micro-batches need


def measure(
    contender: str, num_sentences: int, num_documents: int, num_samples: int, min_seconds: float
) -> dict[str, Any]:
    """The answer of one contender: rows, seconds_per_row, bytes_per_row, and is_equal (None: nothing to compare)."""
    contenders: dict[str, Callable[[], dict[str, Any]]] = {
        "taco-stream": lambda: _row_index("stream", num_documents, min_seconds),
        "taco-document": lambda: _row_index("document", num_documents, min_seconds),
        "taco-sentence": lambda: _sentence(num_sentences, 1, min_seconds),
        "taco-sentence-2-threads": lambda: _sentence(num_sentences, 2, min_seconds),
        "taco-pack": lambda: _pack(num_documents, 1, min_seconds),
        "taco-pack-2-threads": lambda: _pack(num_documents, 2, min_seconds),
        "taco-blend": lambda: _blend(num_samples, min_seconds),
        "taco-locate": lambda: _locate(num_documents, min_seconds),
        "taco-order": lambda: _order(num_samples, min_seconds),
        "taco-order-1e12": lambda: _order(10**12, min_seconds),
        "megatron-stream": lambda: _build_sample_idx(num_documents, min_seconds),
        "megatron-locate": lambda: _locate_theirs(num_documents, min_seconds),
        "megatron-shuffle": lambda: _shuffle(num_samples, min_seconds),
        "megatron-sentence": lambda: _build_mapping(num_sentences, min_seconds),
        "megatron-blend": lambda: _build_blending_indices(num_samples, min_seconds),
        "memory": lambda: _memory(num_sentences, min_seconds),
    }
    return {**contenders[contender](), "peak_bytes": peak_bytes()}


def _answer(rows: int, seconds: float, num_bytes: int, is_equal: bool | None = None) -> dict[str, Any]:
    return {
        "rows": rows,
        "seconds_per_row": seconds / rows,
        "bytes_per_row": num_bytes / rows,
        "is_equal": is_equal,
        "versions": versions("numpy", "megatron-core"),
    }


# -- this project ------------------------------------------------------------------------------------------------------


def _row_index(mode: Any, num_documents: int, min_seconds: float) -> dict[str, Any]:
    from pretrain.data.sample_index import RowIndex

    offsets = document_offsets(num_documents, SEED)
    index = RowIndex(mode, offsets, SEQ_LENGTH)
    seconds = seconds_per_call(lambda number: RowIndex(mode, offsets, SEQ_LENGTH), min_seconds)
    is_equal = _is_stream_equal() if mode == "stream" else _is_document_equal()
    return _answer(index.num_rows, seconds, index.memory_bytes, is_equal)


def _sentence(num_sentences: int, num_threads: int, min_seconds: float) -> dict[str, Any]:
    """Rows of whole sentences, from the lengths to the finished table."""
    from pretrain.data.sample_index import SentenceIndex

    sizes, starts = sentence_lengths(num_sentences, SEED), document_starts(num_sentences, SEED)

    def build(number: int) -> SentenceIndex:
        table = SentenceIndex.build(sizes, starts, SEQ_LENGTH, num_threads=num_threads)
        return SentenceIndex(table, SEQ_LENGTH)

    index = build(0)
    wall = _wall_seconds(build)
    answer = _answer(index.num_rows, seconds_per_call(build, min_seconds), index.memory_bytes, _is_sentence_equal())
    return {
        **answer,
        "wall_seconds_per_row": wall / index.num_rows,
        "tokens_per_row": index.num_tokens / index.num_rows,
    }


def _is_sentence_equal() -> bool:
    """Whether rows begin where a loop over sentences begins them: as many as fit, none across documents."""
    from pretrain.data.sample_index import SentenceIndex

    count, capacity = 2 * _CHECKED_DOCUMENTS, SEQ_LENGTH - 2
    sizes, documents = sentence_lengths(count, SEED), document_starts(count, SEED)
    expected, place, is_first = [], 0, np.zeros(count, np.bool_)
    is_first[documents[:-1]] = True
    filled = 0
    for size, begins in zip(sizes.tolist(), is_first.tolist(), strict=True):
        if begins or filled + size > capacity:
            expected.append(place)
            filled = 0
        filled += size
        place += size
    index = SentenceIndex(SentenceIndex.build(sizes, documents, SEQ_LENGTH), SEQ_LENGTH)
    return index.num_rows == len(expected) and index.first_tokens(np.arange(index.num_rows)).tolist() == expected


def _pack(num_documents: int, num_threads: int, min_seconds: float) -> dict[str, Any]:
    """Whole documents packed into rows; `fill_rate` is the share of places that hold a token."""
    from pretrain.data.sample_index import PackIndex

    offsets = document_offsets(num_documents, SEED)

    def build(number: int) -> PackIndex:
        return PackIndex(PackIndex.build(offsets, SEQ_LENGTH, num_threads=num_threads), SEQ_LENGTH)

    index = build(0)
    wall = _wall_seconds(build)
    answer = _answer(index.num_rows, seconds_per_call(build, min_seconds), index.memory_bytes)
    fill_rate = index.num_filled / (index.num_rows * SEQ_LENGTH)
    return {**answer, "wall_seconds_per_row": wall / index.num_rows, "fill_rate": fill_rate}


def _wall_seconds(action: Callable[[int], object]) -> float:
    start = time.perf_counter()
    action(0)
    return time.perf_counter() - start


def _blend(num_samples: int, min_seconds: float) -> dict[str, Any]:
    """Look-ups in an endless blend of shuffled datasets, dataset, epoch and row of each; nothing is stored."""
    from pretrain.data.native import native

    weights = native().whole_weights(blend_weights())
    sizes = np.maximum(blend_weights() * num_samples, 1).astype(np.int64)
    blend = native().Blend(SEED, weights, sizes, True)
    positions = np.arange(_LOOK_UPS, dtype=np.int64)
    seconds = seconds_per_call(lambda number: blend.look_up(positions + number * _LOOK_UPS), min_seconds)
    datasets, _, _ = blend.look_up(np.arange(1 << 20, dtype=np.int64))
    return _answer(_LOOK_UPS, seconds, 0, np.array_equal(np.bincount(datasets, minlength=NUM_BLENDED), weights))


def _locate(num_documents: int, min_seconds: float) -> dict[str, Any]:
    """Finding where random rows of a stream begin: the search that stands in for a stored table of rows."""
    from pretrain.data.sample_index import RowIndex

    index = RowIndex("stream", document_offsets(num_documents, SEED), SEQ_LENGTH)
    rows = np.random.default_rng(SEED).integers(0, index.num_rows, _LOOK_UPS)
    return _answer(_LOOK_UPS, seconds_per_call(lambda number: index.first_tokens(rows), min_seconds), 0)


def _is_stream_equal() -> bool:
    """Whether rows begin where megatron-core's samples do, once every document is one separator longer for it."""
    from pretrain.data.sample_index import RowIndex

    offsets = document_offsets(_CHECKED_DOCUMENTS, SEED)
    in_order = np.arange(_CHECKED_DOCUMENTS, dtype=np.int32)
    theirs = _sample_idx(np.diff(offsets).astype(np.int32) + 1, in_order, SEQ_LENGTH - 2)
    index = RowIndex("stream", offsets, SEQ_LENGTH)
    # megatron-core gives a sample that begins after a document's separator as an offset past its end.
    documents, places = theirs[:-1, 0], theirs[:-1, 1]
    starts = np.minimum(offsets[documents] + places, offsets[documents + 1])
    return index.num_rows == len(starts) and np.array_equal(index.first_tokens(np.arange(len(starts))), starts)


def _is_document_equal() -> bool:
    """Whether rows begin every capacity tokens of each document, written with NumPy."""
    from pretrain.data.sample_index import RowIndex

    offsets, capacity = document_offsets(_CHECKED_DOCUMENTS, SEED), SEQ_LENGTH - 2
    spans = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    starts = np.concatenate([np.arange(first, end, capacity) for first, end in spans])
    index = RowIndex("document", offsets, SEQ_LENGTH)
    return index.num_rows == len(starts) and np.array_equal(index.first_tokens(np.arange(len(starts))), starts)


def _order(num_samples: int, min_seconds: float) -> dict[str, Any]:
    """Look-ups in the shuffled order; the stored order that it replaces is `megatron-shuffle`."""
    from pretrain.data.order import permute

    positions = np.arange(min(_LOOK_UPS, num_samples), dtype=np.int64)
    seconds = seconds_per_call(lambda number: permute(SEED, number, positions, num_samples), min_seconds)
    small = permute(SEED, 0, np.arange(5000), 5000)
    return _answer(len(positions), seconds, 0, np.array_equal(np.sort(small), np.arange(5000)))


# -- megatron-core -----------------------------------------------------------------------------------------------------


@cache
def _helpers() -> Any:
    """megatron-core's C++ helpers, loaded by path: importing the package costs ten seconds of torch."""
    package = importlib.util.find_spec("megatron")
    folders = [] if package is None else list(package.submodule_search_locations or ())
    files = [path for folder in folders for path in Path(folder, "core", "datasets").glob("helpers_cpp*.so")]
    if not files:
        raise ImportError("megatron-core has no helpers_cpp here; install megatron-core")
    spec = importlib.util.spec_from_file_location("helpers_cpp", files[0])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _sample_idx(sizes: np.ndarray, documents: np.ndarray, seq_length: int) -> np.ndarray:
    return _helpers().build_sample_idx_int64(sizes, documents, seq_length, 1, int(sizes.sum(dtype=np.int64)), True, 0)


def _build_sample_idx(num_documents: int, min_seconds: float) -> dict[str, Any]:
    """Its GPT samples over shuffled documents, as it always builds them."""
    sizes = np.diff(document_offsets(num_documents, SEED)).astype(np.int32)
    documents = np.random.default_rng(SEED).permutation(num_documents).astype(np.int32)
    index = _sample_idx(sizes, documents, SEQ_LENGTH - 2)
    seconds = seconds_per_call(lambda number: _sample_idx(sizes, documents, SEQ_LENGTH - 2), min_seconds)
    return _answer(len(index) - 1, seconds, index.nbytes)


def _locate_theirs(num_documents: int, min_seconds: float) -> dict[str, Any]:
    """Reading both ends of random samples, and their documents, from its arrays; all at once, unlike its items."""
    sizes = np.diff(document_offsets(num_documents, SEED)).astype(np.int32)
    documents = np.random.default_rng(SEED).permutation(num_documents).astype(np.int32)
    index = _sample_idx(sizes, documents, SEQ_LENGTH - 2)
    rows = np.random.default_rng(SEED).integers(0, len(index) - 1, _LOOK_UPS)

    def look_up(number: int) -> np.ndarray:
        first, last = index[rows], index[rows + 1]
        return documents[first[:, 0]] + documents[last[:, 0]]

    return _answer(_LOOK_UPS, seconds_per_call(look_up, min_seconds), 0)


def _shuffle(num_samples: int, min_seconds: float) -> dict[str, Any]:
    """The shuffle index of its GPT dataset: an array of all samples, shuffled by NumPy."""

    def shuffled(number: int) -> np.ndarray:
        order = np.arange(num_samples, dtype=np.uint32)
        np.random.RandomState(number).shuffle(order)
        return order

    seconds = seconds_per_call(shuffled, min_seconds)
    return _answer(num_samples, seconds, 4 * num_samples)


def _build_mapping(num_sentences: int, min_seconds: float) -> dict[str, Any]:
    """Its BERT mapping: one sentence or more per sample, none shortened at random, shuffled as it always is."""
    sizes, starts = sentence_lengths(num_sentences, SEED), document_starts(num_sentences, SEED)
    capacity = SEQ_LENGTH - 2

    def build(number: int) -> Any:
        return _helpers().build_mapping(starts, sizes, 1, 2**62, capacity, 0.0, SEED, False, 1)

    mapping = build(0)
    return _answer(len(mapping), seconds_per_call(build, min_seconds), mapping.nbytes)


def blend_weights() -> np.ndarray:
    """Weights of NUM_BLENDED datasets, float64, their sum 1."""
    weights = np.random.default_rng(SEED).random(NUM_BLENDED) + 0.05
    return weights / weights.sum()


def _build_blending_indices(num_samples: int, min_seconds: float) -> dict[str, Any]:
    datasets, samples, weights = np.zeros(num_samples, np.int16), np.zeros(num_samples, np.int64), blend_weights()

    def build(number: int) -> None:
        _helpers().build_blending_indices(datasets, samples, weights, NUM_BLENDED, num_samples, False)

    return _answer(num_samples, seconds_per_call(build, min_seconds), datasets.nbytes + samples.nbytes)


# -- the machine -------------------------------------------------------------------------------------------------------


def _memory(num_sentences: int, min_seconds: float) -> dict[str, Any]:
    """Reading the sentence lengths once, as any index must; rows are counted as 20 sentences of 26 tokens each."""
    sizes = sentence_lengths(num_sentences, SEED)
    seconds = seconds_per_call(lambda number: sizes.max(), min_seconds)
    return _answer(max(num_sentences // 20, 1), seconds, 0)
