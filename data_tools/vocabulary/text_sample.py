"""A sample of a corpus: the documents with the smallest content hashes, as many as fit; read once, in bounded memory.

The choice depends only on the documents' contents, not on the order of files or the number of runs. The hash is that of
--hash-range, so a sample of a large corpus contains nothing of a range at the upper end, such as 0.99:1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import xxhash

from data_tools.progress import ProgressMeter
from data_tools.readers import Chunk, ReadOptions, expand_inputs, parse_chunk, read_chunks, total_progress

# In a corpus much larger than the sample, only some chunks are parsed: several times as many as needed, by bytes on
# disk (with compression, even more), and enough that it cannot happen that none is chosen.
_TIMES_SAMPLE, _MIN_CHUNKS = 8, 256
# How far the limits may be exceeded before the documents with the largest hashes are discarded.
_SLACK = 1.25


@dataclass
class TextSample:
    """The chosen texts in the order of the corpus.

    `read_documents` were considered; `rejects` could not be read (if that is not an error). `is_whole`: nothing was
    left out except by `hash_range`.
    """

    texts: list[str] = field(default_factory=list)
    num_bytes: int = 0
    read_documents: int = 0
    rejects: int = 0
    is_whole: bool = True


def draw_sample(
    inputs: Sequence[str],
    options: ReadOptions,
    *,
    hash_range: tuple[Fraction, Fraction] = (Fraction(0), Fraction(1)),
    sample_bytes: int | None = None,
    max_documents: int | None = None,
) -> TextSample:
    """At most `sample_bytes` of text (UTF-8) and `max_documents` documents of `inputs`; at least one document.

    In a corpus many times larger than `sample_bytes`, only a share of the chunks is read: the same share in every run,
    whatever the requested number of documents.

    Raises:
        DataError: inputs cannot be read, or `options.on_error` is "stop" and a document cannot be read.
    """
    sources = expand_inputs(list(inputs), options)
    total_bytes = sum(source.num_bytes for source in sources)
    share = _share_of_chunks(total_bytes, options.chunk_bytes, sample_bytes)
    smallest = _Smallest(hash_range, sample_bytes, max_documents)
    rejects = 0
    is_known = all(source.num_bytes for source in sources)
    with ProgressMeter("sampling", total_bytes if is_known else 0) as meter:
        for chunk in total_progress(sources, read_chunks(sources, options)):
            if _is_chosen(chunk, share):
                parsed = parse_chunk(chunk, options)
                rejects += len(parsed.rejects)
                for text in parsed.texts:
                    smallest.add(text)
            meter.update(chunk.progress, f"{smallest.num_bytes / 1e6:,.1f} MB of text")
    sample = smallest.finish()
    sample.rejects = rejects
    sample.is_whole = sample.is_whole and share == 1
    return sample


class _Smallest:
    """Collects documents; those with the largest hashes are discarded as soon as there are too many."""

    def __init__(self, hash_range: tuple[Fraction, Fraction], max_bytes: int | None, max_documents: int | None) -> None:
        self._first, self._end = (int(bound * 2**64) for bound in hash_range)
        self._max_bytes = max_bytes if max_bytes is not None else 2**62
        self._max_documents = max_documents if max_documents is not None else 2**62
        self._texts: list[str] = []
        self._hashes: list[int] = []
        self._sizes: list[int] = []
        self.num_bytes = 0
        self._read_documents = 0
        self._is_whole = True

    def add(self, text: str) -> None:
        self._read_documents += 1
        data = text.encode()
        digest = xxhash.xxh64_intdigest(data)
        if not data or not self._first <= digest < self._end:
            return
        self._texts.append(text)
        self._hashes.append(digest)
        self._sizes.append(len(data))
        self.num_bytes += len(data)
        too_many = len(self._texts) > _SLACK * self._max_documents + 1000
        if too_many or (self.num_bytes > _SLACK * self._max_bytes and len(self._texts) > 1):
            self._discard()

    def finish(self) -> TextSample:
        self._discard()
        return TextSample(self._texts, self.num_bytes, self._read_documents, is_whole=self._is_whole)

    def _discard(self) -> None:
        hashes, sizes = np.array(self._hashes, np.uint64), np.array(self._sizes, np.int64)
        order = np.argsort(hashes, kind="stable")
        num_fitting = int(np.searchsorted(np.cumsum(sizes[order]), self._max_bytes, side="right"))
        count = min(max(num_fitting, 1), self._max_documents, order.size)
        if count == order.size:
            return
        kept = np.sort(order[:count]).tolist()
        # Later documents with larger hashes would be discarded as well.
        self._end = int(hashes[order[count]])
        self._texts = [self._texts[index] for index in kept]
        self._hashes = [self._hashes[index] for index in kept]
        self._sizes = [self._sizes[index] for index in kept]
        self.num_bytes = sum(self._sizes)
        self._is_whole = False


def _share_of_chunks(total_bytes: int, chunk_bytes: int, sample_bytes: int | None) -> Fraction:
    if sample_bytes is None or total_bytes == 0:
        return Fraction(1)
    return min(Fraction(max(_TIMES_SAMPLE * sample_bytes, _MIN_CHUNKS * chunk_bytes), total_bytes), Fraction(1))


def _is_chosen(chunk: Chunk, share: Fraction) -> bool:
    return share == 1 or xxhash.xxh64_intdigest(f"{chunk.source}:{chunk.number}".encode()) < share * 2**64
