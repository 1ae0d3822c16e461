"""Recognises files by their first bytes: what a file is, whatever its name, and how its text gets into a dataset."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass

from data_tools.readers.cutting import BOM
from data_tools.readers.options import Compression, Kind
from pretrain.errors import DataError

HEAD_BYTES = 512
_SAVE = "save its texts as JSON lines, csv or Parquet"
_LFS = b"version https://git-lfs.github.com/spec/"
_NAMES: dict[Compression, str] = {"gz": "gzip", "zst": "Zstandard", "bz2": "bzip2", "xz": "xz"}
_TABLES = {"parquet": "Parquet", "arrow": "Arrow"}
# Some begin with letters: a file of a few bytes may be cut short, not text.
_MAGIC_BYTES = 4
_MAGIC_OF = {
    "gz": b"\x1f\x8b",
    "zst": b"(\xb5/\xfd",
    "bz2": b"BZh9",
    "xz": b"\xfd7zXZ",
    "parquet": b"PAR1",
    "arrow": b"ARROW1",
}
_UNPACK: dict[Compression, str] = {"gz": "gzip -dc", "zst": "zstd -dc", "bz2": "bzip2 -dc", "xz": "xz -dc"}
_UNPACK_OF_SUFFIX = tuple(f".{name}" for name in _UNPACK)


@dataclass(frozen=True)
class Format:
    """What a file is: a `compression` or table `kind` that is read, or else how to unpack it, or what to do.

    `command` writes the content of `{file}` to standard output.
    """

    name: str
    compression: Compression = ""
    kind: Kind | None = None
    command: str = ""
    remedy: str = _SAVE

    @property
    def reads(self) -> str | None:
        """The compression or kind that reads it, if there is one."""
        return self.compression or self.kind


_ZIP = Format("a zip archive", command="unzip -p {file}")
_OFFICE = Format("an Office document", remedy="export its text as csv or txt")
_TAR = Format("a tar archive", command="tar -xOf {file}")
_TEXT = Format("plain text")
_TEXT_KINDS: dict[str, Kind] = {"txt": "txt", "csv": "csv", "tsv": "tsv", "wet": "wet", "warc": "wet"}
# Patterns of the first bytes. The text of a document can begin with some of them, see `recognise`.
_PATTERNS: list[tuple[bytes, Format]] = [
    (rb"\x1f\x8b", Format("gzip", "gz")),
    (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", Format("Zstandard", "zst")),
    (rb"[\x22-\x27]\xb5\x2f\xfd", Format("Zstandard of a version before 0.8", command="zstd -dc {file}")),
    (rb"BZh[1-9](?:1AY&SY|\x17\x72\x45\x38\x50\x90)", Format("bzip2", "bz2")),
    (rb"\xfd7zXZ\0", Format("xz", "xz")),
    (rb"\x5d\0\0..(?:\xff{8}|.{5}\0{3})", Format("LZMA (.lzma)", command="xz -dc --format=lzma {file}")),
    (rb"\x04\x22\x4d\x18|\x02\x21\x4c\x18", Format("LZ4", command="lz4 -dc {file}")),
    (rb"LZIP\x01", Format("lzip", command="lzip -dc {file}")),
    (rb"\x1f\x9d", Format("compress (.Z)", command="gzip -dc < {file}")),
    (rb"\xff\x06\0\0sNaPpY", Format("Snappy", command="snzip -dc {file}")),
    (rb"7z\xbc\xaf\x27\x1c", Format("a 7-Zip archive", command="7z x -so {file}")),
    (rb"Rar!\x1a\x07", Format("a RAR archive", command="unrar p -inul {file}")),
    (rb"PK\x03\x04.{0,400}(?:\[Content_Types\]\.xml|xl/|word/|mimetypeapplication/vnd\.oasis)", _OFFICE),
    (rb"PK(?:\x03\x04|\x05\x06|\x07\x08)", _ZIP),
    (rb".{257}ustar", _TAR),
    (rb"PARE", Format("encrypted Parquet", remedy="decrypt it with its keys, and give the plain file")),
    (rb"PAR1", Format("Parquet", kind="parquet")),
    (rb"ARROW1\0\0", Format("Arrow", kind="arrow")),
    (rb"\xff\xff\xff\xff..\0\0[\x04-\x40]\0\0\0", Format("an Arrow stream", kind="arrow")),
    (rb"FEA1", Format("Feather of version 1", remedy="write it again as version 2, or as Parquet")),
    (rb"ORC", Format("ORC", remedy="write it again as Parquet, for example with pyarrow.orc")),
    (rb"Obj\x01", Format("Avro", remedy="write it again as JSON lines or Parquet")),
    (rb"\x89HDF\r\n\x1a\n", Format("HDF5")),
    (rb"\x93NUMPY", Format("a NumPy array")),
    (rb"\x80[\x02-\x05]", Format("a Python pickle, which can run any program when it is read")),
    (rb"SQLite format 3\0", Format("an SQLite database", remedy="export the table as csv")),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", _OFFICE),
    (rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a", Format("a picture", remedy="leave it out")),
    (rb"MMIDIDX\0\0|TNTIDX\0\0", Format("the index of a token dataset", remedy="it holds token ids, not texts")),
]
_PDF = Format("PDF", remedy="extract its text, for example with pdftotext")
_POINTER = Format("a Git LFS pointer, not the file itself", remedy="fetch the file with `git lfs pull`")
_PAGE = Format("a page of HTML or XML, as servers send instead of a file", remedy="fetch the file again")
_PAGE_BEGINS = re.compile(rb"\s*<(?:!doctype html|html|\?xml[^>]*>\s*<error\b)", re.IGNORECASE)
_COMPILED = [(re.compile(pattern, re.DOTALL), found) for pattern, found in _PATTERNS]
_CONTROLS = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")
# Suffixes that are read only after unpacking, which some of them cannot be recognised by.
_BY_SUFFIX: dict[str, Format] = {
    ".br": Format("Brotli", command="brotli -dc {file}"),
    ".lz4": Format("LZ4", command="lz4 -dc {file}"),
    ".lzma": Format("LZMA (.lzma)", command="xz -dc --format=lzma {file}"),
    ".z": Format("compress (.Z)", command="gzip -dc < {file}"),
    ".tgz": _TAR,
    ".zip": _ZIP,
    ".feather": Format("Feather", kind="arrow"),
    ".xlsx": _OFFICE,
    ".pdf": _PDF,
}


def recognise(head: bytes) -> Format | None:
    """The format of a file that begins with `head`; None for text, and for what is not known."""
    if re.match(rb"%PDF-[12]\.", head):
        return _PDF
    if head.startswith(_LFS):
        return _POINTER
    if is_text(head):
        return None
    return next((found for pattern, found in _COMPILED if pattern.match(head)), None)


def is_page(head: bytes) -> bool:
    """Whether a file that begins with `head` is a web page, or the message of a file server."""
    return _PAGE_BEGINS.match(head.removeprefix(BOM)) is not None


def refuse_page(path: str, head: bytes) -> None:
    """Raises DataError if a file of JSON lines begins as a page."""
    if is_page(head):
        raise DataError(f"{path}: is {_PAGE.name}; {_PAGE.remedy}")


def is_text(head: bytes) -> bool:
    """Whether `head` can be the beginning of UTF-8 text: no control characters, and whole characters but the last."""
    if not head or _CONTROLS.search(head):
        return False
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data" and len(head) >= HEAD_BYTES
    return True


def refuse_other_format(path: str, head: bytes, kind: Kind, compression: Compression) -> None:
    """Raises DataError if a file with the first bytes `head` is not of this kind and compression, but of another.

    What is not recognised at all passes: it may be damaged, which shows when it is read.
    """
    expected = _NAMES[compression] if compression else _TABLES.get(kind, "")
    found = recognise(head)
    is_cut = len(head) < _MAGIC_BYTES or _MAGIC_OF.get(compression or kind, b"").startswith(head)
    if found is None and expected and is_text(head) and not is_cut:
        found = _PAGE if is_page(head) else _TEXT
    if found is None or found.reads == (compression or _TABLES.get(kind, "") and kind):
        return
    words = f"is not {expected} but {found.name}" if expected else f"is {found.name}"
    if not expected and found.compression:
        words = f"begins as {found.name}"
    raise DataError(f"{path}: {words}; {_advice(path, found, kind)}")


def _advice(path: str, found: Format, kind: Kind) -> str:
    """What to do with a file that is `found` and was expected to hold `kind`."""
    lines: Kind = "jsonl" if kind in _TABLES else kind
    if found.command:
        return piped(path, found.command, lines)
    if found is not _TEXT and not found.reads:
        return found.remedy
    formats = found.kind or f"{lines}.{found.compression or 'plain'}"
    if path == "-":
        return f"say so with --input-format {formats}"
    suffix = formats.removesuffix(".plain")
    return f"say so with --input-format {formats} (which counts for every input), or rename it to end in .{suffix}"


def piped(path: str, command: str, formats: str) -> str:
    """The command line that reads a file through `command`, which unpacks `{file}`; `formats` as in --input-format."""
    name = "FILE" if path == "-" else shlex.quote(path)
    return f"`{command.format(file=name)} | taco data preprocess --input - --input-format {formats}`"


def inside_advice(path: str, found: Format, kind: Kind, compression: Compression) -> str:
    """What to do with a compressed file that holds a file that is `found`, not text."""
    if found.compression:
        return piped(path, f"{_UNPACK[compression]} {{file}}", f"{kind}.{found.compression}")
    if found is _TAR:
        return piped(path, _TAR.command, kind)
    if found.kind:
        return f"unpack it, for example with {unpacked(path, compression, '', f'.{found.kind}')}"
    return "unpack it first" if found.command else found.remedy


def unpacked(path: str, compression: Compression, command: str, suffix: str, *, reads_name: bool = True) -> str:
    """The command line that writes the content of a file, passed through `command`, to a new file with `suffix`."""
    if path == "-":
        return f"`... | {command} | taco data preprocess --input - --input-format {suffix[1:]}`"
    stem = path
    while (ending := os.path.splitext(stem)[1]) and ending.lower() in (*_UNPACK_OF_SUFFIX, ".json", suffix):
        stem = stem.removesuffix(ending)
    new = stem + suffix if stem + suffix != path else f"{stem}.new{suffix}"
    name = shlex.quote(path)
    if compression:
        pipe = f" | {command}" if command else ""
        return f"`{_UNPACK[compression]} {name}{pipe} > {shlex.quote(new)}`"
    return f"`{command} {'' if reads_name else '< '}{name} > {shlex.quote(new)}`"


def unknown_kind(path: str, known: str) -> str:
    """What to say of a file whose name has no known suffix; `known` lists those."""
    try:
        with open(path, "rb") as file:
            found = recognise(file.read(HEAD_BYTES))
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    stem, suffix = os.path.splitext(path.lower())
    inner = os.path.splitext(stem)[1].removeprefix(".")
    if found is not None and found.compression and (inner == "tar" or suffix == ".tgz"):
        found = _TAR
    found = found or _BY_SUFFIX.get(suffix)
    if found is None:
        return f"unknown kind; known are {known}; or give it with --input-format"
    if found.compression and inner in _TABLES:
        command = unpacked(path, found.compression, "", f".{inner}")
        return f"is {found.name}; {_TABLES[inner]} is compressed inside, so unpack it: {command}"
    if found.compression:
        return f"is {found.name}; say with --input-format what it holds, such as jsonl.{found.compression}"
    return f"is {found.name}; {_advice(path, found, _TEXT_KINDS.get(inner, 'jsonl'))}"
