"""Recognises by content what this project's programs write, so that nothing else is replaced, removed or left out.

A name proves nothing: `x.lock` may be anybody's file. Files that a crash left empty or torn are recognised too.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from pretrain.data.dataset.dataset_format import MAGIC
from pretrain.data.tokenizer.base import SPECIAL_NAMES
from pretrain.data.tokenizer.folder import MARKER, SOURCE_NAMES

_HEAD_BYTES = 1 << 16
_LOCK = re.compile(rb"host [^\n]*, pid \d+, job [^\n]*\n")
_JOURNAL = re.compile(rb"[0-9a-f]{0,16}|[0-9a-f]{16} \{.*", re.DOTALL)
_JOURNAL_KEYS = (b'"tokenizer"', b'"hash_range"', b'"cleaning"', b'"inputs"')
_REJECT_KEYS = {"path", "line", "byte", "reason", "excerpt"}
_MANIFEST_KEYS = (b'"tokenizer"', b'"bin_bytes"', b'"idx_bytes"', b'"idx_xxh64"', b'"format_version"')
_TABLE_MAGIC = b"TACOINDX"
_TOKENIZER_JSON_KEYS = (b'"version"', b'"truncation"', b'"padding"', b'"added_tokens"')
VOCABULARY = "a vocabulary"
PICTURE_BY = b"taco data stats"
_PICTURE_SIZE = struct.pack(">II", 1560, 600)
# What `write_folder` writes, and what transformers may add to it.
TOKENIZER_FILES = {
    MARKER,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    *SOURCE_NAMES.values(),
}


def is_lock(data: bytes) -> bool:
    """Whether `data` is what a lock holds; an empty one was left by a crash."""
    return not data or _LOCK.fullmatch(data) is not None


def is_journal(data: bytes) -> bool:
    """Whether `data` begins as a journal, which may be torn or have a damaged byte."""
    return _JOURNAL.fullmatch(data) is not None or sum(key in data for key in _JOURNAL_KEYS) >= 3


def is_rejects(data: bytes) -> bool:
    """Whether `data` begins with a line of PREFIX.rejects.jsonl."""
    line, end, _ = data.partition(b"\n")
    if not end and len(data) < _HEAD_BYTES and not line.endswith(b"}"):
        return line.startswith(b'{"path": "')  # torn
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and fields.keys() >= _REJECT_KEYS


def is_manifest(data: bytes) -> bool:
    """Whether `data` begins as the manifest of a dataset, which may be damaged."""
    return sum(key in data for key in _MANIFEST_KEYS) >= 3


def is_wordpiece_vocabulary(data: bytes) -> bool:
    """Whether the five special tokens of BERT stand on lines of their own at the beginning of `data`."""
    if not any(name.encode() in data for name in SPECIAL_NAMES["mask"]):
        return False  # nearly every file
    lines = {line.strip() for line in data.decode("utf-8", "replace").split("\n")}
    return all(lines & set(names) for names in SPECIAL_NAMES.values())


def is_tokenizer_json(data: bytes) -> bool:
    """Whether `data` begins as a `tokenizer.json`."""
    return data.lstrip()[:1] == b"{" and all(key in data for key in _TOKENIZER_JSON_KEYS)


def is_sentencepiece_model(data: bytes) -> bool:
    """Whether `data` begins as a SentencePiece model: a message of pieces, special ones first."""
    return (
        data[:1] == b"\n" and data[2:3] == b"\n" and any(name in data[:200] for name in (b"<unk>", b"[UNK]", b"<pad>"))
    )


def is_tokenizer_folder(path: str | Path) -> bool:
    """Whether `path` is a folder that holds a tokenizer of a dataset or of an export."""
    return os.path.isfile(os.path.join(path, MARKER))


def identity_of(path: str | Path) -> tuple[int, int]:
    """Device and number of a file, the same under all its names. Raises OSError: it cannot be reached."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def identities(paths: Iterable[str | Path]) -> frozenset[tuple[int, int]]:
    """The identities of files, and of all files in folders; what is missing is passed over."""
    found = set()
    for path in paths:
        with suppress(OSError):
            found.add(identity_of(path))
            for name in os.listdir(path) if os.path.isdir(path) else ():
                found.add(identity_of(os.path.join(path, name)))
    return frozenset(found)


def is_picture(data: bytes) -> bool:
    """Whether `data` begins as the picture of `taco data stats`; older ones name Matplotlib, and have one size."""
    is_png = data.startswith(b"\x89PNG\r\n\x1a\n")
    return is_png and (PICTURE_BY in data[:1000] or (b"Matplotlib" in data[:1000] and data[16:24] == _PICTURE_SIZE))


def head_of(path: str | Path, num_bytes: int = _HEAD_BYTES) -> bytes:
    """The first bytes of a file, none of a pipe without a writer. Raises OSError: it cannot be read."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        return file.read(num_bytes)


def has_run(prefix: str) -> bool:
    """Whether a lock or a journal of ours at `prefix` says that a run there has not ended, or was killed."""
    for suffix, is_ours in ((".lock", is_lock), (".journal", is_journal)):
        try:
            if is_ours(head_of(f"{prefix}{suffix}")):
                return True
        except OSError:
            continue
    return False


def product_at(path: str) -> str | None:
    """What the file `path` is, if one of our programs wrote it for itself; None for any other file.

    Only files with the suffix of such a product are opened. Raises OSError: it cannot be read.
    """
    stem, suffix = os.path.splitext(path)
    folder, name = os.path.split(path)
    if name in TOKENIZER_FILES and is_tokenizer_folder(folder):
        return "a file of a tokenizer"
    if suffix == ".tmp":
        prefix = os.path.splitext(stem.removesuffix(".jsonl"))[0].removesuffix(".raw")
        return "an unfinished file of a run" if has_run(prefix) else None
    if suffix == ".bin":
        index = f"{stem}.idx"
        return "the token ids of a dataset" if os.path.isfile(index) and head_of(index).startswith(MAGIC) else None
    if path.endswith(".rejects.jsonl"):
        return "the rejects of a run" if is_rejects(head_of(path)) else None
    return next((what for what, is_it in _PRODUCTS.get(suffix, ()) if is_it(head_of(path))), None)


_PRODUCTS: dict[str, tuple[tuple[str, Callable[[bytes], bool]], ...]] = {
    ".json": (("the manifest of a dataset", is_manifest), ("a tokenizer", is_tokenizer_json)),
    ".txt": ((VOCABULARY, is_wordpiece_vocabulary),),
    ".model": ((VOCABULARY, is_sentencepiece_model),),
    ".idx": (("the index of a dataset", lambda data: data.startswith(MAGIC)),),
    ".index": (("a table of rows", lambda data: data.startswith(_TABLE_MAGIC)),),
    ".lock": (("the lock of a run", is_lock),),
    ".journal": (("the journal of a run", is_journal),),
}
