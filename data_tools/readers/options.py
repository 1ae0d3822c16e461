"""The options that define the documents of a corpus: one frozen, picklable object, the same in every process."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from pretrain.errors import ConfigError

Kind = Literal["jsonl", "txt", "csv", "tsv", "parquet", "arrow", "wet", "hub"]
Compression = Literal["", "gz", "zst", "bz2", "xz"]
TextDocuments = Literal["blank-line", "line", "file"]
OnError = Literal["stop", "skip", "replace"]
Quoting = Literal["auto", "rfc4180", "none"]

CHUNK_BYTES = 4 << 20
MAX_DOCUMENT_BYTES = 1 << 30
MAX_RATIO = 1000
_PLAIN = "plain"
_SIZE = re.compile(r"(\d+)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_CHOICES: dict[str, tuple[str, ...]] = {
    "text_documents": get_args(TextDocuments),
    "on_error": get_args(OnError),
    "quoting": get_args(Quoting),
}
# The command-line flags of fields with other names, for messages.
_FLAGS = {"json_key": "--json-key (--text-column)", "has_header": "--no-header"}


@dataclass(frozen=True)
class ReadOptions:
    """How files become documents.

    `json_key`: the key of a JSON line, or the column of a table, that holds the text; `a.b` is key b inside a, unless
    there is a key "a.b". `input_format`: the kind of every input (such as `jsonl`, `csv.gz` or `csv.plain`), whatever
    its name.
    `text_documents`: what separates documents of plain text. `on_error`: stop at a fault, skip the document, or also
    replace invalid UTF-8 by U+FFFD. `delimiter`: one character between the fields of csv and tsv files; None for the
    usual one. `quoting`: "auto" is RFC 4180 for csv and none for tsv. `has_header`: without one, `json_key` is the
    number of a column, from 1. `max_ratio`: the largest ratio of decompressed to compressed size (0: no limit).
    `chunk_bytes`: approximate bytes of text per chunk; another value cuts a corpus at other places.
    """

    json_key: str = "text"
    input_format: str | None = None
    text_documents: TextDocuments = "blank-line"
    on_error: OnError = "stop"
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    delimiter: str | None = None
    quoting: Quoting = "auto"
    has_header: bool = True
    max_ratio: int = MAX_RATIO
    chunk_bytes: int = CHUNK_BYTES

    def __post_init__(self) -> None:
        """Raises ConfigError: a value is invalid."""
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{_flag(name)} {getattr(self, name)}: expected one of {', '.join(choices)}")
        for name, low in (("max_document_bytes", 1), ("chunk_bytes", 1), ("max_ratio", 0)):
            if getattr(self, name) < low:
                raise ConfigError(f"{_flag(name)} {getattr(self, name)}: expected at least {low}")
        if not self.json_key:
            raise ConfigError(f"{_flag('json_key')}: is empty; name the key or column that holds the text")
        if self.delimiter is not None and (
            len(self.delimiter) != 1 or not self.delimiter.isascii() or self.delimiter in '"\r\n\x00'
        ):
            raise ConfigError(f"--delimiter {self.delimiter!r}: expected one ASCII character, such as ';' or '\\t'")
        if not self.has_header and not (self.json_key.isascii() and self.json_key.isdigit() and int(self.json_key)):
            raise ConfigError(
                "--no-header: columns have no names then; "
                f"give --json-key the number of one, from 1, not {self.json_key!r}"
            )
        if self.input_format is not None:
            parse_format(self.input_format)

    @classmethod
    def parse(cls, **typed: Any) -> ReadOptions:
        """Options from command-line values: sizes such as "512M", `\\t` for a tab; None keeps the default.

        Raises:
            ConfigError: an option is unknown, or a value is invalid.
        """
        known = {field.name for field in fields(cls)}
        unknown = set(typed) - known
        if unknown:
            raise ConfigError(
                f"{', '.join(sorted(unknown))}: no such reading options; known are {', '.join(sorted(known))}"
            )
        values = {name: value for name, value in typed.items() if value is not None}
        for name in ("max_document_bytes", "chunk_bytes"):
            if isinstance(values.get(name), str):
                values[name] = _parse_size(name, values[name])
        if values.get("delimiter") in ("\\t", "tab"):
            values["delimiter"] = "\t"
        return cls(**values)


def parse_format(text: str) -> tuple[Kind, Compression | None]:
    """The kind and the compression (None: decided by the file's name) of an --input-format like `jsonl` or `csv.gz`.

    `jsonl.plain` is a file that is not compressed, although its name says so.

    Raises:
        ConfigError: the kind or compression is unknown.
    """
    kind, _, suffix = text.lower().partition(".")
    kinds = [name for name in get_args(Kind) if name != "hub"]
    aliases = {"ndjson": "jsonl", "json": "jsonl", "text": "txt", "warc": "wet"}
    kind = aliases.get(kind, kind)
    compressions: dict[str, Compression | None] = {name: name for name in get_args(Compression) if name}
    known = {"": None, **compressions, _PLAIN: ""}
    if kind not in kinds or suffix not in known:
        raise ConfigError(
            f"--input-format {text}: expected one of {', '.join(kinds)}, or KIND.COMPRESSION with one of "
            f"{', '.join([*compressions, _PLAIN])}"
        )
    if kind in ("parquet", "arrow") and known[suffix]:
        raise ConfigError(f"--input-format {text}: {kind} is compressed inside; unpack the file, and give {kind}")
    return kind, known[suffix]  # type: ignore[return-value]


def _parse_size(name: str, text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{_flag(name)} {text}: expected a number of bytes, such as 1000000, 512M or 2G")
    return int(match[1]) << _UNITS[match[2].upper()]


def _flag(name: str) -> str:
    return _FLAGS.get(name, "--" + name.replace("_", "-"))
