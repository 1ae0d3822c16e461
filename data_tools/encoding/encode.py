"""Turns chunks of a corpus into token ids: the middle step of preprocessing, the same in one process or many.

`readers` yields chunks, `Encoder` turns one into tokens and counts, `encode_chunks` does so for all of them in order,
and the run appends them to the dataset.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain, islice

import numpy as np
import xxhash

from data_tools.encoding.cleaning import CleaningOptions, clean, count_dropped, drop_by_tokens
from data_tools.encoding.worker_pool import WorkerPool
from data_tools.readers import Chunk, ReadOptions, Reject, parse_chunk
from data_tools.readers.chunks import LineSpan
from pretrain.data.dataset.manifest import Dropped
from pretrain.data.sentences import split_sentences
from pretrain.data.tokenizer.base import best_dtype
from pretrain.data.tokenizer.load import Tokenizer, load_tokenizer
from pretrain.errors import ConfigError, TacoError

# Characters passed to the tokenizer at once: its lists of ids take many times the memory of the text.
_BATCH_CHARACTERS = 1 << 18
# Small chunks go to a worker together, up to these limits.
_GROUP_BYTES, _GROUP_CHUNKS = 1 << 18, 64


@dataclass(frozen=True)
class EncodeOptions:
    """The options that determine the tokens of a corpus; every worker gets them."""

    tokenizer: str
    cased: bool = False
    hash_range: tuple[Fraction, Fraction] = (Fraction(0), Fraction(1))
    reading: ReadOptions = field(default_factory=ReadOptions)
    cleaning: CleaningOptions = field(default_factory=CleaningOptions)


@dataclass(frozen=True)
class EncodedChunk:
    """Tokens of all kept documents of one chunk, concatenated, and what was left out.

    `lengths`: tokens per sequence; `sequences`: sequences per document, None if each document is one sequence.
    """

    source: int
    number: int
    progress: int
    tokens: np.ndarray
    lengths: np.ndarray
    sequences: np.ndarray | None
    dropped: dict[str, Dropped]
    text_bytes: int
    rejects: list[Reject]
    replaced: int
    lines: LineSpan | None


class HashRange:
    """The texts whose xxh64, divided by 2^64, is in [low, high): the same texts in any corpus."""

    def __init__(self, bounds: tuple[Fraction, Fraction]) -> None:
        self._first, self._end = (int(bound * 2**64) for bound in bounds)

    @property
    def is_all(self) -> bool:
        """Whether it contains every text."""
        return self._end - self._first == 2**64

    def __contains__(self, text: str) -> bool:
        return self.is_all or self._first <= xxhash.xxh64_intdigest(text.encode()) < self._end


class Encoder:
    """Turns chunks into tokens with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, options: EncodeOptions) -> None:
        self.tokenizer, self.options = tokenizer, options
        self.dtype = best_dtype(tokenizer.vocab_size)
        self._hash_range = HashRange(options.hash_range)

    def __call__(self, chunk: Chunk) -> EncodedChunk:
        """Parses, selects and tokenises the documents of `chunk`. Raises DataError as `parse_chunk`."""
        parsed = parse_chunk(chunk, self.options.reading)
        dropped: dict[str, Dropped] = {}
        texts = self._select(parsed.texts, dropped)
        tokens, lengths, sequences = self._encode(texts, dropped)
        return EncodedChunk(
            source=chunk.source,
            number=chunk.number,
            progress=chunk.progress,
            tokens=tokens,
            lengths=lengths,
            sequences=sequences,
            dropped=dropped,
            text_bytes=parsed.text_bytes,
            rejects=parsed.rejects,
            replaced=parsed.replaced,
            lines=parsed.lines,
        )

    def _select(self, texts: list[str], dropped: dict[str, Dropped]) -> list[str]:
        """The cleaned texts to keep; the hash range applies to uncleaned texts, so that cleaning changes no split."""
        if not self._hash_range.is_all:
            outside = [
                None if not text or text.isspace() or text in self._hash_range else "outside_hash_range"
                for text in texts
            ]
            add_dropped(dropped, count_dropped(texts, outside))
            texts = [text for text, reason in zip(texts, outside, strict=True) if reason is None]
        kept, reasons = clean(texts, self.options.cleaning)
        add_dropped(dropped, count_dropped(texts, reasons))
        return kept

    def _encode(
        self, texts: list[str], dropped: dict[str, Dropped]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Tokens, tokens per sequence, and sequences per document (None: one each) of the documents to keep."""
        pieces, counts = texts, np.ones(len(texts), np.int64)
        if self.options.cleaning.split_sentences:
            pieces, counts = split_sentences(texts)
        tokens, lengths = self._tokenize(pieces)
        owners = np.repeat(np.arange(len(texts)), counts)
        per_document = _sum_by(owners, lengths, len(texts))
        keep = np.ones(len(texts), bool)
        for reason, mask in drop_by_tokens(per_document, self.options.cleaning).items():
            keep &= ~mask
            dropped_indices = np.flatnonzero(mask)
            size = sum(len(texts[index].encode()) for index in dropped_indices)
            add_dropped(
                dropped, {reason: Dropped(dropped_indices.size, int(per_document[dropped_indices].sum()), size)}
            )
        if not keep.all():
            tokens = tokens[np.repeat(keep[owners], lengths)]
        is_kept = keep[owners] & (lengths > 0)  # a sentence may have no token, such as one of control characters
        lengths = lengths[is_kept]
        if not self.options.cleaning.split_sentences:
            return tokens, lengths, None
        return tokens, lengths, _sum_by(owners, is_kept, len(texts))[keep]

    def _tokenize(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        parts = [self.tokenizer.encode(batch) for batch in _batches(texts)]
        tokens = [np.empty(0, self.dtype), *(ids for ids, _ in parts)]
        lengths = [np.empty(0, np.int64), *(lengths for _, lengths in parts)]
        return np.concatenate(tokens), np.concatenate(lengths)


def parse_hash_range(text: str) -> tuple[Fraction, Fraction]:
    """The two bounds of `LO:HI`, as exact fractions, so that 0:0.95 and 0.95:1 have neither gap nor overlap.

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


def encode_chunks(
    chunks: Iterable[Chunk],
    encoder: Encoder,
    workers: int,
    *,
    max_bytes_ahead: int = 256 << 20,
    check_stop: Callable[[], None] = lambda: None,
) -> Iterator[EncodedChunk]:
    """Encodes `chunks` in order; in this process if there are fewer than two `workers`, or fewer than two chunks.

    Raises:
        DataError: the first fault in the corpus, for any number of workers.
        TacoError: a chunk killed three workers; also whatever `check_stop` raises.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process is one core; children inherit it
    is_small, chunks = _look_ahead(chunks) if workers > 1 else (True, chunks)
    if is_small:
        for chunk in chunks:
            check_stop()
            yield encoder(chunk)
        check_stop()
        return
    with WorkerPool(
        make_group_encoder,
        encoder.options,
        workers,
        describe=describe_group,
        item_bytes=lambda group: sum(chunk.held_bytes for chunk in group),
        max_bytes_ahead=max_bytes_ahead,
        check_stop=check_stop,
    ) as pool:
        for group in pool.map(group_small(chunks)):
            yield from group


def group_small(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """Consecutive small chunks together, such as those of small files: a message to a worker costs more than one.

    The first groups are small, so that a small corpus is shared between workers too.
    """
    group: list[Chunk] = []
    most, num_bytes = 1, 0
    source = iter(chunks)
    while True:
        try:
            chunk = next(source)
        except StopIteration:
            break
        except TacoError:  # a fault in the chunks before it comes first
            if group:
                yield group
            raise
        size = _GROUP_BYTES if chunk.text_bytes is None else chunk.text_bytes
        if group and (len(group) >= most or num_bytes + size > _GROUP_BYTES):
            yield group
            most = min(2 * most, _GROUP_CHUNKS)
            group, num_bytes = [], 0
        group.append(chunk)
        num_bytes += size
    if group:
        yield group


def _look_ahead(chunks: Iterable[Chunk]) -> tuple[bool, Iterator[Chunk]]:
    """Whether there are fewer than two chunks, and all of them; an error while reading is raised in its turn."""
    source = iter(chunks)
    first: list[Chunk] = []
    try:
        first += islice(source, 1)
        first += islice(source, 1)
    except TacoError as error:
        return True, _then_raise(first, error)
    return len(first) < 2, chain(first, source)


def _then_raise(chunks: list[Chunk], error: TacoError) -> Iterator[Chunk]:
    yield from chunks
    raise error


def make_group_encoder(options: EncodeOptions) -> Callable[[list[Chunk]], list[EncodedChunk]]:
    """An encoder with its own tokenizer, for a worker. Raises DataError: the tokenizer cannot be loaded."""
    encoder = Encoder(load_tokenizer(options.tokenizer, cased=options.cased), options)
    return lambda group: [encoder(chunk) for chunk in group]


def describe_group(group: list[Chunk]) -> str:
    """The location of chunks, for messages."""
    first, last = group[0], group[-1]
    if len(group) == 1:
        return f"{first.path} (chunk {first.number}, up to byte {first.progress} on disk)"
    if first.path == last.path:
        return f"{first.path} (chunks {first.number} to {last.number}, up to byte {last.progress} on disk)"
    return f"one of the files from {first.path} to {last.path}"


def _sum_by(owners: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """The sum of the `values` of each owner, int64 [count]; `owners` are in ascending order."""
    ends = np.searchsorted(owners, np.arange(count + 1))
    sums = np.concatenate(([0], np.cumsum(values, dtype=np.int64)))
    return np.diff(sums[ends])


def _batches(texts: list[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
