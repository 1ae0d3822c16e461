"""Chunks of a corpus to token ids, in this process or in many; the same result, in the same order, either way.

The middle step of preprocessing: `readers` gives chunks, `encode_chunks` gives their tokens back in order, the writer
appends them. Worker processes are started afresh (no fork: the parent may have threads), hold one tokenizer each, get
a bounded number of chunks ahead, and end with the parent however it ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import xxhash

from data_tools.readers import Chunk, ReadOptions, parse_chunk
from pretrain.data.indexed_dataset import best_dtype
from pretrain.data.manifest import Dropped
from pretrain.data.tokenizer import Tokenizer, load_tokenizer
from pretrain.errors import ConfigError, DataError, TacoError

# Chunks ahead of the writer: enough that no worker waits, few enough that memory stays small.
_CHUNKS_PER_WORKER = 3
_BYTES_AHEAD = 256 * 1024 * 1024


@dataclass(frozen=True)
class EncodeOptions:
    """What decides the tokens of a chunk, and so goes to every worker."""

    tokenizer: str
    cased: bool = False
    json_key: str = "text"
    hash_range: tuple[Fraction, Fraction] = (Fraction(0), Fraction(1))

    @property
    def reading(self) -> ReadOptions:
        """How the corpus becomes documents."""
        return ReadOptions(json_key=self.json_key)


@dataclass(frozen=True)
class EncodedChunk:
    """Tokens of all kept documents of one chunk, one after the other, with the number of tokens of each."""

    tokens: np.ndarray
    lengths: np.ndarray
    dropped: dict[str, Dropped]
    text_bytes: int
    progress: int


class HashRange:
    """The texts whose xxh64, divided by 2^64, lies in [low, high): the same ones in whatever corpus they stand."""

    def __init__(self, bounds: tuple[Fraction, Fraction]) -> None:
        self._first, self._end = (int(bound * 2**64) for bound in bounds)

    def __contains__(self, text: str) -> bool:
        if self._end - self._first == 2**64:
            return True
        return self._first <= xxhash.xxh64_intdigest(text.encode()) < self._end


class Encoder:
    """Turns chunks into tokens with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, options: EncodeOptions) -> None:
        self.tokenizer, self.options = tokenizer, options
        self.dtype = best_dtype(tokenizer.vocab_size)
        self._hash_range = HashRange(options.hash_range)

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """Parses, selects and tokenises the documents of `chunk`. Raises DataError as `parse_chunk`."""
        dropped: dict[str, Dropped] = {}
        texts = []
        parsed = parse_chunk(chunk, self.options.reading)
        for text in parsed.texts:
            if not text or text.isspace():
                _count(dropped, "empty", text)
            elif text not in self._hash_range:
                _count(dropped, "outside_hash_range", text)
            else:
                texts.append(text)
        encoded = []
        for text, ids in zip(texts, self.tokenizer.encode_batch(texts), strict=True):
            if ids:
                encoded.append(np.array(ids, self.dtype))
            else:
                _count(dropped, "no_tokens", text)
        tokens = np.concatenate(encoded) if encoded else np.empty(0, self.dtype)
        lengths = np.array([ids.size for ids in encoded], np.int64)
        return EncodedChunk(tokens, lengths, dropped, parsed.text_bytes, chunk.progress)


def parse_hash_range(text: str) -> tuple[Fraction, Fraction]:
    """The two bounds of `LO:HI`, exactly as written, so that 0:0.95 and 0.95:1 meet without gap or overlap.

    Raises:
        ConfigError: not two numbers with 0 <= LO < HI <= 1.
    """
    parts = text.split(":")
    try:
        low, high = map(Fraction, parts)
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"--hash-range {text}: expected LO:HI, two numbers from 0 to 1, like 0:0.95") from None
    if not 0 <= low < high <= 1:
        raise ConfigError(f"--hash-range {text}: expected 0 <= LO < HI <= 1, like 0:0.95")
    return low, high


def add_dropped(total: dict[str, Dropped], more: dict[str, Dropped]) -> None:
    """Adds the counts of `more` to `total`."""
    for reason, item in more.items():
        old = total.get(reason, Dropped())
        total[reason] = Dropped(old.documents + item.documents, old.tokens + item.tokens, old.bytes + item.bytes)


def encode_chunks(chunks: Iterable[Chunk], encoder: Encoder, workers: int) -> Iterator[EncodedChunk]:
    """Encodes `chunks` in order; with fewer than two `workers` in this process.

    Raises:
        DataError: the first mistake in the corpus, whatever the number of workers.
        TacoError: a worker was killed.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process is one core; children inherit it
    if workers < 2:
        yield from map(encoder.encode, chunks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (encoder.options,)) as pool:
        try:
            yield from _in_order(chunks, lambda chunk: pool.submit(_encode_in_worker, chunk), workers)
        except BrokenProcessPool:
            raise TacoError(
                f"one of the {workers} worker processes was killed from outside, probably for lack of memory; "
                "nothing was written: run again with fewer --workers, or free memory"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _in_order(
    chunks: Iterable[Chunk], submit: Callable[[Chunk], Future[EncodedChunk]], workers: int
) -> Iterator[EncodedChunk]:
    waiting: deque[tuple[int, Future[EncodedChunk]]] = deque()
    bytes_ahead = 0
    failure: DataError | None = None
    for chunk in _until_failure(chunks):
        if isinstance(chunk, DataError):
            failure = chunk
            break
        waiting.append((chunk.held_bytes, submit(chunk)))
        bytes_ahead += chunk.held_bytes
        while len(waiting) > workers * _CHUNKS_PER_WORKER or (bytes_ahead > _BYTES_AHEAD and waiting):
            size, future = waiting.popleft()
            yield future.result()
            bytes_ahead -= size
    while waiting:
        yield waiting.popleft()[1].result()
    if failure is not None:
        raise failure


def _until_failure(chunks: Iterable[Chunk]) -> Iterator[Chunk | DataError]:
    """A mistake that the reader finds comes last, after those that workers find in the chunks before it."""
    try:
        yield from chunks
    except DataError as error:
        yield error


def _count(dropped: dict[str, Dropped], reason: str, text: str) -> None:
    add_dropped(dropped, {reason: Dropped(documents=1, bytes=len(text.encode()))})


_worker: Encoder | None = None


def _start_worker(options: EncodeOptions) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the pool
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = Encoder(load_tokenizer(options.tokenizer, cased=options.cased), options)


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers, and they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(chunk: Chunk) -> EncodedChunk:
    if _worker is None:
        raise AssertionError("the worker was not started")
    return _worker.encode(chunk)
