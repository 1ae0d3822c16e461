"""Token datasets on disk: a strict, memory-mapped, torch-free reader and writer of Megatron's MMIDIDX files.

It stands between preprocessing, which writes token ids once, and the sample index, which reads them in any order.
A dataset is PREFIX.bin (token ids, nothing else), PREFIX.idx (where they begin) and PREFIX.json (the manifest, absent
from Megatron's own datasets). PREFIX.idx, little-endian, without gaps, n sequences and m document-index entries:

    offset 0    9 bytes     magic b"MMIDIDX\\x00\\x00"
           9    uint64      version, 1
          17    uint8       dtype code: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16
                            (6 float64, 7 float32 exist in Megatron and are refused: they hold no token ids)
          18    uint64      n
          26    uint64      m, the number of documents + 1
          34    int32[n]    tokens per sequence
                int64[n]    byte offset of each sequence in PREFIX.bin; contiguous from 0
                int64[m]    first sequence of each document, then n
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pretrain import __version__, durable
from pretrain.data.hashing import HashingFile, hash_chunks, hash_file
from pretrain.data.manifest import CHUNK_BYTES, REMEDY, Dropped, Manifest, TokenizerInfo
from pretrain.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER_BYTES = 34
DTYPE_OF_CODE = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
CODE_OF_DTYPE = {name: code for code, name in DTYPE_OF_CODE.items()}
# Elements looked at in one go: bounds the memory of every check, and of the sums that could otherwise overflow.
_CHUNK = 1 << 20
_MAX_SEQUENCE = 2**31 - 1  # lengths are int32
_WHOLE_FILE = 2**63 - 1


def dataset_path(prefix: str | Path, suffix: str) -> Path:
    """`prefix` + `suffix` (".bin", ".idx", ".json"); dots inside the prefix stay."""
    return Path(f"{prefix}{suffix}")


def best_dtype(vocab_size: int) -> np.dtype:
    """The narrowest dtype that Megatron would choose: uint16 for vocabularies below 65,500, else int32."""
    return np.dtype("<u2" if vocab_size < 65_500 else "<i4")


class IndexedDataset:
    """One dataset, opened read-only; every header field is checked against the real file sizes at opening.

    Attributes:
        prefix: the path without suffix.
        dtype: of the token ids on disk.
        num_sequences, num_documents, num_tokens: counts.
        sequence_lengths: int32 [num_sequences], tokens.
        sequence_pointers: int64 [num_sequences], bytes from the start of PREFIX.bin.
        document_indices: int64 [num_documents + 1], first sequence of each document.
        document_offsets: int64 [num_documents + 1], first token of each document; aligned and in memory.
        tokens: `dtype` [num_tokens], mapped.
        manifest: of PREFIX.json, None where there is no such file.
    """

    def __init__(self, prefix: str | Path) -> None:
        """Opens PREFIX.bin and PREFIX.idx.

        Raises:
            DataError: a file is missing, or the file, field, expected and found value of what is wrong with it.
        """
        self.prefix = str(prefix)
        self.bin_path, self.idx_path = dataset_path(prefix, ".bin"), dataset_path(prefix, ".idx")
        self._bin_bytes, self._idx_bytes = _file_size(self.bin_path), _file_size(self.idx_path)
        self.dtype, self.num_sequences, num_entries = self._read_header()
        self.num_documents = num_entries - 1
        lengths_end = HEADER_BYTES + 4 * self.num_sequences
        self.sequence_lengths = _map(self.idx_path, "<i4", HEADER_BYTES, self.num_sequences)
        self.sequence_pointers = _map(self.idx_path, "<i8", lengths_end, self.num_sequences)
        self.document_indices = _map(self.idx_path, "<i8", lengths_end + 8 * self.num_sequences, num_entries)
        self.num_tokens = self._check_sequences() // self.dtype.itemsize
        self._check_documents()
        self.tokens = _map(self.bin_path, self.dtype.str, 0, self.num_tokens)
        self.document_offsets = self._find_document_offsets()
        self.manifest = self._load_manifest()

    def __len__(self) -> int:
        return self.num_documents

    def document(self, index: int) -> np.ndarray:
        """Token ids of document `index` (0 <= index < num_documents), all its sequences together; a mapped view."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"{self.prefix}: document {index} of {self.num_documents}")
        return self.tokens[self.document_offsets[index] : self.document_offsets[index + 1]]

    def _read_header(self) -> tuple[np.dtype, int, int]:
        """Dtype, sequence count and document-index count; Python integers, so nothing overflows."""
        if self._idx_bytes < HEADER_BYTES:
            self._refuse("size", f"at least {HEADER_BYTES} bytes", f"{self._idx_bytes}")
        with self.idx_path.open("rb") as file:
            header = file.read(HEADER_BYTES)
        if header[:9] != MAGIC:
            self._refuse("magic", f"{MAGIC!r}", f"{header[:9]!r}")
        version, code, num_sequences, num_entries = struct.unpack("<QBQQ", header[9:])
        if version != VERSION:
            self._refuse("version", f"{VERSION}", f"{version}")
        if code not in DTYPE_OF_CODE:
            self._refuse("dtype code", f"an integer type, one of {sorted(DTYPE_OF_CODE)}", f"{code}")
        expected = HEADER_BYTES + 12 * num_sequences + 8 * num_entries
        if expected != self._idx_bytes:
            counts = f"{num_sequences} sequences and {num_entries} document indices"
            self._refuse("size", f"{expected} bytes for {counts}", f"{self._idx_bytes}")
        return np.dtype(DTYPE_OF_CODE[code]).newbyteorder("<"), num_sequences, num_entries

    def _check_sequences(self) -> int:
        """Holds lengths, pointers and the size of PREFIX.bin against each other; returns bytes of tokens."""
        end = 0
        for first, last in _chunks(self.num_sequences):
            lengths = self.sequence_lengths[first:last].astype(np.int64)
            self._require(first, "sequence length", lengths >= 0, "at least ", np.zeros_like(lengths), lengths)
            stops = end + np.cumsum(lengths * self.dtype.itemsize)
            starts = np.concatenate(([end], stops[:-1]))
            found = np.asarray(self.sequence_pointers[first:last])
            self._require(first, "sequence pointer", found == starts, "", starts, found)
            end = int(stops[-1])
            if end > self._bin_bytes:  # before the next chunk, so that sums stay far from 2^63
                break
        if end != self._bin_bytes:
            more = "" if end <= self._bin_bytes else " or more"
            raise DataError(f"{self.bin_path}: expected {end}{more} bytes, found {self._bin_bytes}; {REMEDY}")
        return end

    def _check_documents(self) -> None:
        if self.num_documents < 0:
            self._refuse("document-index count", "1 or more", "0")
        previous = 0
        if self.document_indices[0] != 0:
            self._refuse("document index 0", "0", f"{self.document_indices[0]}")
        for first, last in _chunks(self.num_documents + 1):
            found = np.asarray(self.document_indices[first:last])
            before = np.concatenate(([previous], found[:-1]))
            self._require(first, "document index", found >= before, "at least ", before, found)
            previous = int(found[-1])
        if previous != self.num_sequences:
            self._refuse("last document index", f"the sequence count {self.num_sequences}", f"{previous}")

    def _find_document_offsets(self) -> np.ndarray:
        offsets = np.empty(self.num_documents + 1, np.int64)
        for first, last in _chunks(self.num_documents + 1):
            sequence = self.document_indices[first:last]
            is_end = sequence == self.num_sequences
            offsets[first:last][is_end] = self.num_tokens
            offsets[first:last][~is_end] = self.sequence_pointers[sequence[~is_end]] // self.dtype.itemsize
        return offsets

    def _load_manifest(self) -> Manifest | None:
        path = dataset_path(self.prefix, ".json")
        if not path.exists():
            return None
        manifest = Manifest.load(path)
        for field, found in (
            ("dtype", self.dtype.name),
            ("documents", self.num_documents),
            ("sequences", self.num_sequences),
            ("tokens", self.num_tokens),
            ("bin_bytes", self._bin_bytes),
            ("idx_bytes", self._idx_bytes),
        ):
            expected = getattr(manifest, field)
            if expected != found:
                raise DataError(f"{path}: {field}: the manifest says {expected}, the dataset has {found}; {REMEDY}")
        return manifest

    def _require(
        self, first: int, field: str, is_good: np.ndarray, relation: str, expected: np.ndarray, found: np.ndarray
    ) -> None:
        """Raises for the first entry that is not good; `first` is the number of the chunk's first entry."""
        if not is_good.all():
            worst = int(np.argmin(is_good))
            self._refuse(f"{field} {first + worst}", f"{relation}{expected[worst]}", f"{found[worst]}")

    def _refuse(self, field: str, expected: str, found: str) -> None:
        raise DataError(f"{self.idx_path}: {field}: expected {expected}, found {found}; {REMEDY}")


class IndexedDatasetWriter:
    """Writes one dataset under temporary names and publishes it at the end; memory does not grow with the dataset.

    Use it as a context manager. Leaving the block without `finalize`, or by an exception, removes everything it wrote.
    """

    def __init__(self, prefix: str | Path, dtype: np.typing.DTypeLike, *, overwrite: bool = False) -> None:
        """Prepares to write token ids of `dtype` to PREFIX.bin, .idx and .json.

        Raises:
            DataError: the dataset exists and `overwrite` is not set, or `dtype` cannot be stored.
        """
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype.name not in CODE_OF_DTYPE:
            raise DataError(f"{prefix}: dtype {self.dtype.name} cannot hold token ids; use {', '.join(CODE_OF_DTYPE)}")
        existing = [path for suffix in (".json", ".idx", ".bin") if (path := dataset_path(prefix, suffix)).exists()]
        if existing and not overwrite:
            raise DataError(f"{existing[0]}: exists already; choose another output prefix, or ask to overwrite it")
        self._temporary = {
            name: dataset_path(prefix, f".{name}.tmp") for name in ("bin", "idx", "lengths", "documents")
        }
        self._range = np.iinfo(self.dtype)
        self._num_sequences = self._num_documents = self._num_tokens = self._largest_id = 0

    def __enter__(self) -> IndexedDatasetWriter:
        try:
            with _explain_os_errors(self.prefix):
                self._bin = HashingFile(self._temporary["bin"], CHUNK_BYTES)
                self._lengths = self._temporary["lengths"].open("w+b")
                self._documents = self._temporary["documents"].open("w+b")
                self._documents.write(struct.pack("<q", 0))
        except DataError:
            self._remove_temporaries()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for file in (self._bin, self._lengths, self._documents):
            with suppress(OSError):  # closing flushes, which fails once more on a full disk
                file.close()
        self._remove_temporaries()

    def add_document(self, sequences: Sequence[np.ndarray]) -> None:
        """Appends a document of one or more sequences: one-dimensional integer arrays of token ids, any length.

        Raises:
            DataError: an id does not fit into the dtype, an array has a wrong shape or type, or the disk is full.
        """
        encoded = [self._encode(np.asarray(sequence)) for sequence in sequences]
        with _explain_os_errors(self.prefix):
            for tokens in encoded:
                self._bin.write(tokens.tobytes())
                self._lengths.write(struct.pack("<i", tokens.size))
                self._num_tokens += tokens.size
            self._num_sequences += len(encoded)
            self._num_documents += 1
            self._documents.write(struct.pack("<q", self._num_sequences))

    def finalize(
        self,
        *,
        tokenizer: TokenizerInfo,
        dropped: Mapping[str, Dropped] | None = None,
        command: Sequence[str] = (),
    ) -> Manifest:
        """Publishes the dataset, PREFIX.json last, all of it on disk before the first rename; returns the manifest.

        Raises:
            DataError: an id is not in the vocabulary of `tokenizer`, or writing fails; nothing is published then.
        """
        if self._num_tokens and self._largest_id >= tokenizer.vocab_size:
            raise DataError(
                f"{self.prefix}: token id {self._largest_id} is not in the vocabulary of {tokenizer.name} "
                f"({tokenizer.vocab_size} pieces); write the dataset with the tokenizer that made its ids"
            )
        with _explain_os_errors(self.prefix):
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
                idx_xxh64=index.digests()[0],
                dropped=dict(dropped or {}),
                command=tuple(command),
                created_by=f"taco-pretrain {__version__}",
            )
            self._publish(manifest)
        return manifest

    def _encode(self, sequence: np.ndarray) -> np.ndarray:
        if sequence.size == 0:
            return np.empty(0, self.dtype)
        if sequence.ndim != 1 or sequence.dtype.kind not in "iu" or sequence.size > _MAX_SEQUENCE:
            raise DataError(
                f"{self.prefix}: document {self._num_documents}: expected a one-dimensional integer array of at most "
                f"{_MAX_SEQUENCE} tokens, found {sequence.dtype} of shape {sequence.shape}"
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

    def _remove_temporaries(self) -> None:
        for path in self._temporary.values():
            path.unlink(missing_ok=True)

    def _write_index(self) -> HashingFile:
        """The index from the spooled lengths and document indices, a bounded piece at a time."""
        index = HashingFile(self._temporary["idx"], _WHOLE_FILE)
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
            for block in _blocks(self._documents):
                index.write(block)
            index.sync()
        return index

    def _publish(self, manifest: Manifest) -> None:
        # What is replaced stops looking finished before its parts change.
        for suffix in (".json", ".idx"):
            dataset_path(self.prefix, suffix).unlink(missing_ok=True)
        for name in ("bin", "idx"):
            self._temporary[name].replace(dataset_path(self.prefix, f".{name}"))
        durable.sync_folder(dataset_path(self.prefix, ".json").parent)
        manifest.save(dataset_path(self.prefix, ".json"))


def verify(prefix: str | Path) -> list[str]:
    """Every problem of the dataset, one sentence each: structure, counts, then the hash of every chunk; [] is sound."""
    try:
        manifest = IndexedDataset(prefix).manifest
    except DataError as error:
        return [str(error)]
    json_path = dataset_path(prefix, ".json")
    if manifest is None:
        return [f"{json_path}: there is no manifest, so the content cannot be checked"]
    problems = []
    bin_path, idx_path = dataset_path(prefix, ".bin"), dataset_path(prefix, ".idx")
    for number, digest in enumerate(hash_chunks(bin_path, manifest.chunk_bytes)):
        if digest != manifest.bin_xxh64[number]:
            first = number * manifest.chunk_bytes
            last = min(first + manifest.chunk_bytes, manifest.bin_bytes)
            problems.append(_wrong_hash(bin_path, f"bytes {first} to {last}", manifest.bin_xxh64[number], digest))
    digest = hash_file(idx_path)
    if digest != manifest.idx_xxh64:
        problems.append(_wrong_hash(idx_path, "the whole file", manifest.idx_xxh64, digest))
    return problems


def _wrong_hash(path: Path, where: str, expected: str, found: str) -> str:
    return f"{path}: {where}: expected xxh64 {expected}, found {found}; {REMEDY}"


def _file_size(path: Path) -> int:
    try:
        size = path.stat().st_size
    except OSError as error:
        reason = error.strerror or "cannot be read"
        raise DataError(f"{path}: {reason}; a dataset prefix is the path without .bin/.idx") from None
    if not path.is_file():
        raise DataError(f"{path}: is not a file; a dataset prefix is the path without .bin/.idx")
    return size


def _map(path: Path, dtype: str, offset: int, count: int) -> np.ndarray:
    if count == 0:  # an empty range cannot be mapped
        return np.empty(0, dtype)
    # A plain view: slices of np.memmap objects cost several times as much.
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,)).view(np.ndarray)


def _chunks(count: int) -> Iterator[tuple[int, int]]:
    for first in range(0, count, _CHUNK):
        yield first, min(first + _CHUNK, count)


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    file.seek(0)
    while block := file.read(_CHUNK):
        yield block


@contextmanager
def _explain_os_errors(prefix: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = error.filename or prefix
        raise DataError(f"{where}: cannot be written: {error.strerror}; free space or choose another folder") from error
