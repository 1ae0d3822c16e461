"""The datasets to merge: opening them, their order, whether they are compatible, and copying them with hash checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import xxhash

from data_tools.output.corpus_parts import group_parts
from data_tools.output.old_manifests import options_of_command
from data_tools.output.recorded_options import command_words, content_flags
from data_tools.own_files import identities
from pretrain.data.dataset.dataset_format import dataset_path, map_array, map_index, prefix_of
from pretrain.data.dataset.dataset_writer import IndexedDatasetWriter
from pretrain.data.dataset.manifest import REMEDY, InputRecord, Manifest, Preprocessing
from pretrain.durable import hash_range
from pretrain.errors import ConfigError, DataError

_COPY_BYTES = 16 << 20
_DOCUMENTS_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class MergeInput:
    """One dataset to merge; `options` is None if no single run of preprocessing would make it."""

    prefix: str
    manifest: Manifest
    options: Preprocessing | None

    @classmethod
    def open(cls, prefix: str) -> MergeInput:
        """Opens the dataset `prefix`, checking file sizes and the index.

        Raises:
            DataError: it has no manifest, or the files are not as written.
        """
        manifest = Manifest.load(dataset_path(prefix, ".json"))
        for suffix, expected in ((".bin", manifest.bin_bytes), (".idx", manifest.idx_bytes)):
            path = dataset_path(prefix, suffix)
            if not path.is_file():
                raise DataError(f"{path}: No such file; {REMEDY}")
            if path.stat().st_size != expected:
                raise DataError(f"{path}: expected {expected} bytes, found {path.stat().st_size}; {REMEDY}")
        digest = hash_range(dataset_path(prefix, ".idx"), 0, manifest.idx_bytes)
        if digest != manifest.idx_xxh64:
            path = dataset_path(prefix, ".idx")
            raise DataError(f"{path}: expected xxh64 {manifest.idx_xxh64}, found {digest}; {REMEDY}")
        options = manifest.preprocessing or options_of_command(dataset_path(prefix, ".json"), manifest.command)
        return cls(prefix, manifest, options)

    def copy_to(self, writer: IndexedDatasetWriter, check_stop: Callable[[], None]) -> None:
        """Adds all documents to `writer`, a bounded piece at a time, and checks every hash on the way.

        Raises:
            DataError: bytes are not as written, or the disk is full.
        """
        manifest = self.manifest
        dtype = np.dtype(manifest.dtype).newbyteorder("<")
        tokens = map_array(dataset_path(self.prefix, ".bin"), dtype, 0, manifest.tokens)
        index = map_index(dataset_path(self.prefix, ".idx"), manifest.sequences, manifest.documents + 1)
        lengths, pointers, documents = index
        checker, first = _HashChecker(self), 0
        while first < manifest.documents:
            check_stop()
            sequences = documents[first : first + _DOCUMENTS_AT_ONCE + 1].astype(np.int64)
            starts = np.full(sequences.size, manifest.bin_bytes)
            is_inside = sequences < manifest.sequences
            starts[is_inside] = pointers[sequences[is_inside]]
            count = max(int(np.searchsorted(starts[1:], starts[0] + _COPY_BYTES, "right")), 1)
            begin, end = starts[[0, count]] // tokens.itemsize
            checker.update(tokens[begin:end])
            writer.add_documents(
                tokens[begin:end], lengths[sequences[0] : sequences[count]], np.diff(sequences[: count + 1])
            )
            first += count
        checker.finish()


class _HashChecker:
    """Checks the bytes of PREFIX.bin, while they are copied, against the hashes in the manifest."""

    def __init__(self, dataset: MergeInput) -> None:
        self._path, self._manifest = dataset_path(dataset.prefix, ".bin"), dataset.manifest
        self._digest, self._number, self._filled = xxhash.xxh64(), 0, 0

    def update(self, tokens: np.ndarray) -> None:
        rest = tokens.view(np.uint8).data
        while len(rest):
            piece = rest[: self._manifest.chunk_bytes - self._filled]
            self._digest.update(piece)
            self._filled += len(piece)
            rest = rest[len(piece) :]
            if self._filled == self._manifest.chunk_bytes:
                self.finish()

    def finish(self) -> None:
        """Checks the current chunk. Raises DataError: it is not as written."""
        if not self._filled:
            return
        expected, actual = self._manifest.bin_xxh64[self._number], self._digest.hexdigest()
        if actual != expected:
            first = self._number * self._manifest.chunk_bytes
            where = f"{self._path}: bytes {first} to {first + self._filled}"
            raise DataError(f"{where}: expected xxh64 {expected}, found {actual}; {REMEDY}")
        self._digest, self._number, self._filled = xxhash.xxh64(), self._number + 1, 0


def open_inputs(prefixes: Sequence[str], output: str, *, dedup: bool, is_mixed: bool) -> list[MergeInput]:
    """The datasets in the order in which they are joined: parts of one corpus by their numbers.

    Raises:
        ConfigError: the output is one of them, or one is named twice.
        DataError: one is damaged, a part is missing or given twice, or they are incompatible.
    """
    names = [prefix_of(prefix) for prefix in prefixes]
    written = identities(_files(output))
    seen: dict[object, str] = {}
    for name in names:
        place = Path(name).resolve()
        files = identities(_files(name))
        if place == Path(output).resolve() or files & written:
            raise ConfigError(f"{output}: is both output and input; give the result a new name")
        keys = {place, *files}
        for before in (seen[key] for key in keys if key in seen):
            also = f" (also as {before})" if before != name else ""
            raise ConfigError(f"{name}: is named twice{also}; name each dataset once")
        seen |= dict.fromkeys(keys, name)
    datasets: list[MergeInput] = []
    records: dict[object, tuple[InputRecord, ...] | None] = {}
    for name in names:
        item = MergeInput.open(name)
        inputs = item.manifest.shard_inputs
        # Parts record the same long list of inputs; it is kept once.
        manifest = replace(item.manifest, shard_inputs=records.setdefault(inputs, inputs))
        datasets.append(replace(item, manifest=manifest))
    first = datasets[0]
    for other in datasets[1:]:
        _require_same(first, other, "tokenizer.sha256", lambda item: item.manifest.tokenizer.sha256)
        _require_same(first, other, "dtype", lambda item: item.manifest.dtype)
        if not is_mixed:
            _require_same(first, other, "command", lambda item: _content_flags(item.options))
    if not is_mixed and not dedup:
        for item in datasets:
            if item.options is not None and item.options.dedup:
                raise DataError(
                    f"{item.prefix}: was made with --dedup, but datasets joined without it may share documents; "
                    "give --dedup, or --mixed to join them as they are"
                )
    return [item for group in group_parts(datasets, is_mixed=is_mixed) for item in group]


def _files(prefix: str) -> list[Path]:
    return [dataset_path(prefix, suffix) for suffix in (".bin", ".idx", ".json")]


def merged_options(datasets: Sequence[MergeInput], *, dedup: bool) -> Preprocessing | None:
    """The options of the single run that would have given the merged dataset; None if there is no such run."""
    records = [item.options for item in datasets if item.options is not None]
    if len(records) < len(datasets) or len({_content_flags(record) for record in records}) > 1:
        return None
    firsts = [item for item in datasets if not item.manifest.shard or item.manifest.shard[0] == 0]
    return replace(records[0], inputs=tuple(name for item in firsts for name in _inputs(item)), dedup=dedup)


def merged_command(
    datasets: Sequence[MergeInput], output: str, record: Preprocessing | None, *, dedup: bool
) -> list[str]:
    """The command of the run with the options `record`, or of this merge if there is no such run."""
    if record is not None:
        return command_words(record, output)
    prefixes = [item.prefix for item in datasets]
    return ["taco", "data", "merge", output, *prefixes, "--mixed", *(["--dedup"] if dedup else [])]


def _inputs(item: MergeInput) -> tuple[str, ...]:
    return item.options.inputs if item.options is not None else ()


def _content_flags(record: Preprocessing | None) -> tuple[tuple[str, ...], ...]:
    """The options that must agree; tokenizers are compared by hash, and --dedup may be done in one pass or two."""
    return content_flags(record) if record is not None else (("not made by", "taco data preprocess"),)


def _require_same(first: MergeInput, other: MergeInput, name: str, value: Callable[[MergeInput], object]) -> None:
    expected, actual = value(first), value(other)
    if expected != actual:
        remedy = "; --mixed joins them all the same" if name == "command" else "; make them with the same tokenizer"
        raise DataError(
            f"{other.prefix}: {name}: expected {_words(expected)} as of {first.prefix}, found {_words(actual)}{remedy}"
        )


def _words(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(" ".join(option) for option in value) or "no options"
    return str(value)
