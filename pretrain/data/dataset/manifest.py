"""The manifest of a dataset: PREFIX.json, which records how PREFIX.bin and PREFIX.idx were made.

The writer saves it last, so its presence means that the dataset is complete; `verify` checks the files against its
hashes; training uses it to compare the tokenizers of several datasets. It ends with the hash of its own bytes, so a
damaged or edited manifest is refused wherever it is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from pretrain import durable
from pretrain.data.tokenizer.info import Count, TokenizerInfo
from pretrain.durable import FileRecord
from pretrain.errors import DataError

FORMAT_VERSION = 2
CHUNK_BYTES = 64 * 1024 * 1024
_RESTORE = "restore it from a copy"
REMEDY = f"{_RESTORE}, or run `taco data preprocess` again"

Xxh64 = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
OptionValue = str | int | bool | None
DtypeName = Annotated[str, Field(pattern=r"^(uint8|int8|int16|int32|int64|uint16)$")]


@dataclass(frozen=True)
class Dropped:
    """What was left out of the dataset for one reason; tokens are 0 if the text was never tokenised."""

    documents: Count = 0
    tokens: Count = 0
    bytes: Count = 0


@dataclass(frozen=True)
class Preprocessing:
    """What besides the text determined a dataset's content: the options of `taco data preprocess`.

    Inputs and tokenizer are as given on the command line. `hash_range`: LO:HI. `reading` and `cleaning`: every option
    by name, including those left at their defaults, which another release may change.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    inputs: tuple[str, ...]
    tokenizer: str
    cased: bool
    hash_range: str
    dedup: bool
    reading: Mapping[str, OptionValue]
    cleaning: Mapping[str, OptionValue]


@dataclass(frozen=True)
class InputRecord:
    """One input of a run, as it was when the run began: the path that was read, and its name in the folder or pattern
    that was given (else the last part of the path), by which a corpus is recognised at another place."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    path: str
    name: str
    num_bytes: Count
    mtime_ns: int


@dataclass(frozen=True)
class Manifest:
    """The content of PREFIX.json; hashes are xxh64, 16 hexadecimal digits.

    `tokenizer_files`: those in the folder PREFIX.tokenizer at the time of writing, none if there was no folder.
    `replaced`: documents kept with U+FFFD for bytes that were not UTF-8. `shard`: (index, number of shards).
    `preprocessing`: None if no single run of preprocessing would give the dataset, and in manifests of release 0.1.0,
    which recorded the options in `command` only. `shard_inputs`: all inputs of the run that made a part, in order; None
    for a whole dataset, and in parts of 0.1.0.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    tokenizer: TokenizerInfo
    dtype: DtypeName
    documents: Count
    sequences: Count
    tokens: Count
    bin_bytes: Count
    idx_bytes: Count
    bin_xxh64: tuple[Xxh64, ...]
    idx_xxh64: Xxh64
    dropped: Mapping[str, Dropped]
    command: tuple[str, ...]
    created_by: str
    chunk_bytes: Annotated[int, Field(ge=8, multiple_of=8)] = CHUNK_BYTES  # whole tokens of any dtype
    tokenizer_files: tuple[FileRecord, ...] = ()
    replaced: Count = 0
    shard: tuple[Count, Count] | None = None
    preprocessing: Preprocessing | None = None
    shard_inputs: tuple[InputRecord, ...] | None = None
    format_version: int = FORMAT_VERSION

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """The manifest in the file `path`.

        Raises:
            DataError: the file is missing, is not JSON, has another format version, differs from what was written, or a
                field is invalid.
        """
        text = _read(path)
        tree = _parse(path, text)
        version = tree.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            words = (
                f"this release reads {FORMAT_VERSION}, found {version}; use the release that made it, or a newer one"
            )
            raise DataError(f"{path}: format_version: {words}")
        if version is None:
            words = f"no manifest of a dataset (no format_version); rename it if it is another file, else {REMEDY}"
            raise DataError(f"{path}: is {words}")
        if version != FORMAT_VERSION:
            raise DataError(f"{path}: format_version: expected {FORMAT_VERSION}, found {version!r}; {REMEDY}")
        try:
            del tree[durable.SELF_HASH]
        except KeyError:
            raise DataError(f"{path}: {durable.SELF_HASH}: is missing; {REMEDY}") from None
        try:
            manifest = _adapter().validate_json(json.dumps(tree), strict=True)
        except ValidationError as error:
            raise DataError(f"{path}: {_explain(error)}; {REMEDY}") from None
        problems = manifest.problems()
        if problems:
            raise DataError(f"{path}: {'; '.join(problems)}; {REMEDY}")
        if not durable.is_sealed(text, "text"):
            raise DataError(f"{path}: content differs from what was written ({durable.SELF_HASH}); {REMEDY}")
        return manifest

    def save(self, path: Path) -> None:
        """Writes the file `path` atomically: a crash leaves the old one or the new one."""
        durable.write_text(path, durable.seal_json(asdict(self), "text"))

    def problems(self) -> list[str]:
        """Every contradiction between fields; empty for a valid manifest."""
        vocab_size, problems = self.tokenizer.vocab_size, []
        for name, token_id in asdict(self.tokenizer.special).items():
            if token_id >= vocab_size:
                problems.append(f"tokenizer.special.{name} ({token_id}) must be below vocab_size ({vocab_size})")
        num_chunks = -(-self.bin_bytes // self.chunk_bytes)
        if len(self.bin_xxh64) != num_chunks:
            problems.append(
                f"bin_xxh64: expected {num_chunks} hashes for {self.bin_bytes} bytes in chunks of "
                f"{self.chunk_bytes}, found {len(self.bin_xxh64)}"
            )
        for record in self.tokenizer_files:
            if Path(record.name).name != record.name:
                problems.append(f"tokenizer_files: names a file outside the tokenizer's folder: {record.name!r}")
        return problems


@cache
def _adapter() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        prefix = path.with_suffix("")
        if os.path.exists(f"{prefix}.bin") and os.path.exists(f"{prefix}.idx"):
            remedy = (
                "a dataset of another program has none: make it again with `taco data preprocess`; else " + _RESTORE
            )
        else:
            remedy = "give the prefix of a dataset; `taco data preprocess` makes one"
        raise DataError(f"{path}: no such manifest; {remedy}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not a JSON file ({error}); {REMEDY}") from None
    if not isinstance(tree, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(tree).__name__}; {REMEDY}")
    return tree


def _explain(error: ValidationError) -> str:
    problems = []
    for item in error.errors():
        field, message = ".".join(map(str, item["loc"])), item["msg"]
        problems.append(f"{field}: {message[0].lower()}{message[1:]}, found {str(item['input'])[:80]!r}")
    return "; ".join(problems)
