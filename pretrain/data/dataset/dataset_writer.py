"""Writes datasets: appends token ids to temporary files, publishes them all at the end, can resume in between.

The last step of preprocessing and merging. Memory does not grow with the dataset: data for the index is spooled to disk
beside PREFIX.bin.tmp, 4 bytes per sequence and 8 per document.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from pretrain import __version__, durable
from pretrain.data.dataset.dataset_format import CODE_OF_DTYPE, MAGIC, MAX_SEQUENCE_TOKENS, VERSION, dataset_path
from pretrain.data.dataset.manifest import CHUNK_BYTES, Dropped, InputRecord, Manifest, Preprocessing
from pretrain.data.tokenizer.info import TokenizerInfo
from pretrain.durable import HashingFile, folder_records, hash_range
from pretrain.errors import DataError

_BLOCK = 1 << 20


@dataclass(frozen=True)
class WriterState:
    """What a writer has flushed to disk; a resuming writer truncates the files to this and continues.

    `bin_xxh64` holds the hash of every 64 MiB of PREFIX.bin.tmp; the last part may be shorter.
    """

    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    largest_id: int = 0
    bin_xxh64: tuple[str, ...] = ()


class IndexedDatasetWriter:
    """Writes one dataset under temporary names and publishes it at the end; memory does not grow with the dataset.

    Use it as a context manager. Leaving the block without `finalize`, or with an exception, removes everything it
    wrote, unless `keep` was called.
    """

    def __init__(
        self,
        prefix: str | Path,
        dtype: np.typing.DTypeLike,
        *,
        overwrite: bool = False,
        state: WriterState | None = None,
    ) -> None:
        """Prepares to write token ids of `dtype` to PREFIX.bin, .idx and .json, or to resume from `state`.

        Raises:
            DataError: the dataset exists and `overwrite` is not set, or `dtype` cannot be stored.
        """
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype.name not in CODE_OF_DTYPE:
            raise DataError(f"{prefix}: dtype {self.dtype.name} cannot hold token ids; use {', '.join(CODE_OF_DTYPE)}")
        existing = [path for suffix in (".json", ".idx", ".bin") if (path := dataset_path(prefix, suffix)).exists()]
        if existing and not overwrite:
            raise DataError(
                f"{existing[0]}: exists already; choose another output prefix, or replace it with --overwrite"
            )
        self._temporary = _temporary_paths(prefix)
        self._range = np.iinfo(self.dtype)
        self._resumed = state
        self._is_kept = False
        state = state or WriterState()
        self._num_sequences, self._num_documents = state.sequences, state.documents
        self._num_tokens, self._largest_id = state.tokens, state.largest_id

    def __enter__(self) -> IndexedDatasetWriter:
        try:
            with explain_os_errors(self.prefix):
                self._open()
        except DataError:
            if self._resumed is None:
                remove_temporaries(self.prefix)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for file in (self._bin, self._lengths, self._documents):
            with suppress(OSError):  # closing flushes, which fails again on a full disk
                file.close()
        if not self._is_kept:
            remove_temporaries(self.prefix)

    @property
    def bin_path(self) -> Path:
        """The file of the token ids until they are published."""
        return self._temporary["bin"]

    @property
    def num_bytes(self) -> int:
        """Bytes of token ids so far."""
        return self._bin.num_bytes

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return self._num_tokens

    @property
    def num_documents(self) -> int:
        """Documents so far."""
        return self._num_documents

    def add_document(self, sequences: Sequence[np.ndarray]) -> None:
        """Appends a document of one or more sequences: one-dimensional integer arrays of token ids, any length.

        Raises:
            DataError: an id does not fit the dtype, an array has the wrong shape or type, or the disk is full.
        """
        arrays = [np.asarray(sequence) for sequence in sequences]
        encoded = [self._encode(array) for array in arrays]
        tokens = np.concatenate(encoded) if encoded else np.empty(0, self.dtype)
        self.add_documents(
            tokens, np.array([array.size for array in encoded], np.int64), np.array([len(encoded)], np.int64)
        )

    def add_documents(
        self, tokens: np.ndarray, sequence_lengths: np.ndarray, sequences_per_document: np.ndarray | None = None
    ) -> None:
        """Appends many documents at once: `tokens` [t], all ids concatenated, with `sequence_lengths` [s].

        `sequences_per_document` [d] groups the sequences into documents; without it each sequence is a document.

        Raises:
            DataError: an id does not fit the dtype, the lengths do not add up, or the disk is full.
        """
        lengths = np.asarray(sequence_lengths, np.int64)
        counts = np.ones(lengths.size, np.int64) if sequences_per_document is None else sequences_per_document
        ends = self._num_sequences + np.cumsum(counts, dtype=np.int64)
        self._check_lengths(tokens, lengths, counts)
        encoded = self._encode(tokens)
        with explain_os_errors(self.prefix):
            self._bin.write(np.ascontiguousarray(encoded).view(np.uint8).data)
            self._lengths.write(lengths.astype("<i4").tobytes())
            self._documents.write(ends.astype("<i8").tobytes())
        self._num_tokens += tokens.size
        self._num_sequences += lengths.size
        self._num_documents += ends.size

    def checkpoint(self) -> WriterState:
        """Flushes everything so far to disk and returns the state to resume from.

        Raises:
            DataError: the disk is full.
        """
        with explain_os_errors(self.prefix):
            self._bin.sync()
            for file in (self._lengths, self._documents):
                file.flush()
                os.fsync(file.fileno())
        return WriterState(
            self._num_documents, self._num_sequences, self._num_tokens, self._largest_id, tuple(self._bin.digests())
        )

    def keep(self) -> None:
        """Keeps the temporary files at the end of the block, for a later writer with a `state`."""
        self._is_kept = True

    def finalize(
        self,
        *,
        tokenizer: TokenizerInfo,
        dropped: Mapping[str, Dropped] | None = None,
        command: Sequence[str] = (),
        replaced: int = 0,
        shard: tuple[int, int] | None = None,
        preprocessing: Preprocessing | None = None,
        shard_inputs: Sequence[InputRecord] | None = None,
        publish_beside: Callable[[Manifest], None] | None = None,
    ) -> Manifest:
        """Publishes the dataset, PREFIX.json last, all of it on disk before the first rename; returns the manifest.

        `publish_beside` publishes further files, while there is no PREFIX.json; its OSErrors count as write errors. The
        other arguments go into the manifest.

        Raises:
            DataError: an id is not in the vocabulary of `tokenizer`, or writing fails; nothing is published then.
        """
        if self._num_tokens and self._largest_id >= tokenizer.vocab_size:
            raise DataError(
                f"{self.prefix}: token id {self._largest_id} is not in the vocabulary of {tokenizer.name} "
                f"({tokenizer.vocab_size} pieces); write the dataset with the tokenizer that made its ids"
            )
        with explain_os_errors(self.prefix):
            self._bin.sync()
            index = self._write_index()
            manifest = Manifest(
                tokenizer=tokenizer,
                dtype=self.dtype.name,
                documents=self._num_documents,
                sequences=self._num_sequences,
                tokens=self._num_tokens,
                bin_bytes=self._bin.num_bytes,
                idx_bytes=index.num_bytes,
                chunk_bytes=CHUNK_BYTES,
                bin_xxh64=tuple(self._bin.digests()),
                idx_xxh64=index.hexdigest(),
                dropped=dict(dropped or {}),
                command=tuple(command),
                created_by=f"taco-pretrain {__version__}",
                replaced=replaced,
                shard=shard,
                preprocessing=preprocessing,
                shard_inputs=None if shard_inputs is None else tuple(shard_inputs),
            )
            return self._publish(manifest, publish_beside)

    def _open(self) -> None:
        if self._resumed is None:
            self._bin = HashingFile(self._temporary["bin"], xxhash.xxh64, CHUNK_BYTES)
            self._lengths: BinaryIO = self._temporary["lengths"].open("w+b")
            self._documents: BinaryIO = self._temporary["documents"].open("w+b")
            self._documents.write(struct.pack("<q", 0))
            return
        if not can_resume(self.prefix, self.dtype, self._resumed):
            raise DataError(f"{self._temporary['bin']}: is not what was written; start over")
        size = self._num_tokens * self.dtype.itemsize
        self._bin = HashingFile(
            self._temporary["bin"], xxhash.xxh64, CHUNK_BYTES, num_bytes=size, digests=self._resumed.bin_xxh64
        )
        self._lengths = _truncate(self._temporary["lengths"], 4 * self._num_sequences)
        self._documents = _truncate(self._temporary["documents"], 8 * (self._num_documents + 1))

    def _check_lengths(self, tokens: np.ndarray, lengths: np.ndarray, counts: np.ndarray) -> None:
        if lengths.size and (lengths.min() < 0 or lengths.max() > MAX_SEQUENCE_TOKENS):
            raise DataError(
                f"{self.prefix}: document {self._num_documents} or a later one: expected sequences of at most "
                f"{MAX_SEQUENCE_TOKENS} tokens, found {int(lengths.min())} to {int(lengths.max())}"
            )
        if lengths.sum() != tokens.size or counts.sum() != lengths.size or (counts < 0).any():
            raise DataError(
                f"{self.prefix}: document {self._num_documents}: {tokens.size} tokens in sequences of "
                f"{int(lengths.sum())}, {lengths.size} sequences in documents of {int(counts.sum())}"
            )

    def _encode(self, sequence: np.ndarray) -> np.ndarray:
        if sequence.size == 0:
            return np.empty(0, self.dtype)
        if sequence.ndim != 1 or sequence.dtype.kind not in "iu":
            raise DataError(
                f"{self.prefix}: document {self._num_documents}: expected a one-dimensional integer array of at most "
                f"{MAX_SEQUENCE_TOKENS} tokens, found {sequence.dtype} of shape {sequence.shape}"
            )
        smallest, largest = int(sequence.min()), int(sequence.max())
        if smallest < 0 or largest > self._range.max:
            wrong = smallest if smallest < 0 else largest
            raise DataError(
                f"{self.prefix}: document {self._num_documents}: token id {wrong} does not fit into "
                f"{self.dtype.name} (0 to {self._range.max}); best_dtype(vocab_size) chooses a dtype that holds all ids"
            )
        self._largest_id = max(self._largest_id, largest)
        return sequence.astype(self.dtype, copy=False)

    def _write_index(self) -> HashingFile:
        """Writes the index from the spooled lengths and document indices, a bounded piece at a time."""
        index = HashingFile(self._temporary["idx"], xxhash.xxh64)
        with closing(index):
            index.write(MAGIC + struct.pack("<QB", VERSION, CODE_OF_DTYPE[self.dtype.name]))
            index.write(struct.pack("<QQ", self._num_sequences, self._num_documents + 1))
            for block in _blocks(self._lengths):
                index.write(block)
            end = 0
            for block in _blocks(self._lengths):
                stops = end + np.cumsum(np.frombuffer(block, "<i4").astype("<i8") * self.dtype.itemsize)
                index.write(np.concatenate(([end], stops[:-1])).astype("<i8").tobytes())
                end = int(stops[-1])
            if end != self._bin.num_bytes:
                path = self._temporary["lengths"]
                raise DataError(f"{path}: adds up to {end} bytes, not {self._bin.num_bytes}; start over")
            for block in _blocks(self._documents):
                index.write(block)
            index.sync()
        return index

    def _publish(self, manifest: Manifest, publish_beside: Callable[[Manifest], None] | None) -> Manifest:
        # A dataset that is replaced must stop looking complete before its files change.
        for suffix in (".json", ".idx"):
            dataset_path(self.prefix, suffix).unlink(missing_ok=True)
        durable.sync_folder(dataset_path(self.prefix, ".json").parent)
        if publish_beside is not None:
            publish_beside(manifest)
        for name in ("bin", "idx"):
            self._temporary[name].replace(dataset_path(self.prefix, f".{name}"))
        durable.sync_folder(dataset_path(self.prefix, ".json").parent)
        manifest = replace(manifest, tokenizer_files=folder_records(dataset_path(self.prefix, ".tokenizer")))
        manifest.save(dataset_path(self.prefix, ".json"))
        return manifest


def can_resume(prefix: str | Path, dtype: np.typing.DTypeLike, state: WriterState) -> bool:
    """Whether the temporary files of `prefix` hold all of `state`; hashes only the last chunk of PREFIX.bin.tmp."""
    paths, num_bytes = _temporary_paths(prefix), state.tokens * np.dtype(dtype).itemsize
    sizes = {"bin": num_bytes, "lengths": 4 * state.sequences, "documents": 8 * (state.documents + 1)}
    if not all(paths[name].is_file() and paths[name].stat().st_size >= size for name, size in sizes.items()):
        return False
    first = max(num_bytes - 1, 0) // CHUNK_BYTES * CHUNK_BYTES
    return num_bytes == 0 or hash_range(paths["bin"], first, num_bytes) == state.bin_xxh64[-1]


@contextmanager
def explain_os_errors(prefix: str | Path) -> Iterator[None]:
    """Turns an OSError in writing into a DataError with the file and the remedy."""
    try:
        yield
    except OSError as error:
        path = error.filename or prefix
        raise DataError(f"{path}: cannot be written: {error.strerror}; free space or choose another folder") from error


def remove_temporaries(prefix: str | Path) -> None:
    """Removes the temporary files that a writer of `prefix` left."""
    for path in _temporary_paths(prefix).values():
        path.unlink(missing_ok=True)


def _temporary_paths(prefix: str | Path) -> dict[str, Path]:
    return {name: dataset_path(prefix, f".{name}.tmp") for name in ("bin", "idx", "lengths", "documents")}


def _truncate(path: Path, num_bytes: int) -> BinaryIO:
    file = path.open("r+b")
    file.truncate(num_bytes)
    file.seek(num_bytes)
    return file


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    file.seek(0)
    while block := file.read(_BLOCK):
        yield block
