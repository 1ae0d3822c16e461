"""Corpora to documents: JSON lines and plain text, as they are or compressed with gzip or Zstandard.

The first step of the flow. It has two halves, so that many workers can share one corpus: `read_chunks` decompresses and
cuts files into chunks of whole documents (one process, no work per document), `parse_chunk` turns a chunk into texts
(any process). Encoding is strict, and every complaint names file and line. Memory is bounded by the chunk size, or by
the longest document up to a limit.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal

import orjson
import zstandard

from pretrain.errors import DataError

CHUNK_BYTES = 256 * 1024
MAX_DOCUMENT_BYTES = 1 << 30
KINDS: dict[str, Literal["jsonl", "txt"]] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".txt": "txt"}
COMPRESSED = (".gz", ".zst")
_BOM = b"\xef\xbb\xbf"
_BLANK_LINE = re.compile(rb"^[ \t\r\x0b\x0c]*\n", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n(?:[ \t\r\x0b\x0c]*\n)+")
# A Zstandard block of 4 bytes can stand for 128 KiB, so a small piece bounds what a hostile file unfolds to at once.
_ZSTD_PIECE = 1024


@dataclass(frozen=True)
class Chunk:
    """Whole documents of one file, as bytes, and where they stand in it.

    `first_line` counts from 1; `first_byte` from 0, in the decompressed text; `progress` is the number of bytes of the
    file on disk read so far, of this file.
    """

    path: str
    kind: Literal["jsonl", "txt"]
    first_line: int
    first_byte: int
    data: bytes
    progress: int


def check_inputs(paths: Sequence[str | Path]) -> int:
    """Bytes on disk of all input files together, after a look at each.

    Raises:
        DataError: files are missing, empty, no files, or of a kind that is not known; all of them are named.
    """
    problems, total = [], 0
    for path in map(Path, paths):
        try:
            size = path.stat().st_size
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
            continue
        if not path.is_file():
            problems.append(f"{path}: is not a file; give its files one by one")
        elif size == 0:
            problems.append(f"{path}: is empty (0 bytes)")
        elif _kind(path) is None:
            problems.append(
                f"{path}: unknown kind; known are {', '.join(KINDS)}, each plain or with {', '.join(COMPRESSED)}"
            )
        total += size
    if problems:
        raise DataError("; ".join(problems))
    return total


def read_chunks(
    path: str | Path, *, chunk_bytes: int = CHUNK_BYTES, max_document_bytes: int = MAX_DOCUMENT_BYTES
) -> Iterator[Chunk]:
    """Cuts the file `path` into chunks of about `chunk_bytes` that hold whole documents, in order.

    Raises:
        DataError: the file is missing, empty, truncated, damaged, or a line (of text: a document) is too long.
    """
    path = Path(path)
    check_inputs([path])
    kind = _kind(path) or "txt"
    line, offset = 1, 0
    for data, progress in _whole_documents(path, kind, chunk_bytes, max_document_bytes):
        body = data.removeprefix(_BOM) if offset == 0 else data
        yield Chunk(str(path), kind, line, offset + len(data) - len(body), body, progress)
        line, offset = line + data.count(b"\n"), offset + len(data)
    if offset == 0:
        raise DataError(f"{path}: is empty after decompression")


def parse_chunk(chunk: Chunk, json_key: str = "text") -> list[str]:
    """The texts of the documents in `chunk`, in order; of JSON lines, the string under `json_key`.

    Blank lines separate documents of plain text and are skipped in JSON lines.

    Raises:
        DataError: text that is not UTF-8, a broken JSON line, no such key, or a value that is no string.
    """
    if chunk.kind == "txt":
        return _parse_text(chunk)
    return [
        _parse_line(chunk, number, line, json_key)
        for number, line in enumerate(chunk.data.split(b"\n"))
        if line.strip()
    ]


def read_all_chunks(paths: Sequence[str | Path]) -> Iterator[Chunk]:
    """Chunks of all files in order, `progress` counted over all of them. Raises as `read_chunks`."""
    before = 0
    for path in paths:
        for chunk in read_chunks(path):
            yield replace(chunk, progress=before + chunk.progress)
        before += Path(path).stat().st_size


def _kind(path: Path) -> Literal["jsonl", "txt"] | None:
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return KINDS.get(name.suffix.lower())


def _whole_documents(path: Path, kind: str, chunk_bytes: int, limit: int) -> Iterator[tuple[bytes, int]]:
    """Blocks joined and cut again where documents end; the last one may lack its final newline."""
    pending: list[bytes] = []
    pending_bytes = line = 0
    for block, progress in _whole_lines(path, chunk_bytes, limit):
        end = len(block) if kind == "jsonl" else _end_of_last_blank_line(block)
        if end:
            yield b"".join([*pending, block[:end]]), progress
            pending, pending_bytes = [], 0
        if end < len(block):
            pending.append(block[end:])
            pending_bytes += len(block) - end
        line += block.count(b"\n")
        if pending_bytes > limit:
            raise _too_long(path, line, "document", limit)
    if pending:
        yield b"".join(pending), progress


def _whole_lines(path: Path, chunk_bytes: int, limit: int) -> Iterator[tuple[bytes, int]]:
    pending: list[bytes] = []
    pending_bytes, line = 0, 1
    for block, progress in _blocks(path, chunk_bytes):
        end = block.rfind(b"\n") + 1
        if end:
            lines = b"".join([*pending, block[:end]])
            yield lines, progress
            line += lines.count(b"\n")
            pending, pending_bytes = [], 0
        pending.append(block[end:])
        pending_bytes += len(block) - end
        if pending_bytes > limit:
            raise _too_long(path, line, "line", limit)
    if pending_bytes:
        yield b"".join(pending), progress


def _end_of_last_blank_line(block: bytes) -> int:
    end = 0
    for match in _BLANK_LINE.finditer(block):
        end = match.end()
    return end


def _too_long(path: Path, line: int, what: str, limit: int) -> DataError:
    return DataError(f"{path}:{line}: a {what} of more than {limit} bytes; split it, or remove it")


def _blocks(path: Path, chunk_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Decompressed blocks that are not empty, each with the bytes of the file read so far."""
    suffix = path.suffix.lower()
    try:
        with path.open("rb") as file:
            decompress = {".gz": _gzip_blocks, ".zst": _zstd_blocks}.get(suffix, _plain_blocks)
            for block in decompress(file, chunk_bytes):
                if block:
                    yield block, file.tell()
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise DataError(f"{path}: damaged or truncated {suffix} file ({error}); fetch it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _plain_blocks(file: BinaryIO, chunk_bytes: int) -> Iterator[bytes]:
    while block := file.read(chunk_bytes):
        yield block


def _gzip_blocks(file: BinaryIO, chunk_bytes: int) -> Iterator[bytes]:
    with gzip.open(file, "rb") as unfolded:
        while block := unfolded.read(chunk_bytes):
            yield block


def _zstd_blocks(file: BinaryIO, chunk_bytes: int) -> Iterator[bytes]:
    """Frame after frame; the library's own stream reader takes a truncated frame for the end."""
    decompressor = zstandard.ZstdDecompressor()
    frame = decompressor.decompressobj()
    is_inside = False
    gathered: list[bytes] = []
    gathered_bytes = 0
    while data := file.read(_ZSTD_PIECE):
        while data:
            block = frame.decompress(data)
            gathered.append(block)
            gathered_bytes += len(block)
            is_inside = not frame.eof
            data = frame.unused_data
            if frame.eof:
                frame = decompressor.decompressobj()
        if gathered_bytes >= chunk_bytes:
            yield b"".join(gathered)
            gathered, gathered_bytes = [], 0
    if is_inside:
        raise EOFError("it ends inside a frame")
    yield b"".join(gathered)


def _parse_text(chunk: Chunk) -> list[str]:
    try:
        text = chunk.data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(chunk, error, 0, 0) from None
    # Only line ends count: U+2028 and its kin may stand inside a text.
    parts = _BLANK_LINES.split("\n" + text.replace("\r\n", "\n") + "\n")
    return [body for part in parts if (body := part.strip("\n"))]


def _parse_line(chunk: Chunk, number: int, line: bytes, json_key: str) -> str:
    """The text of line `number` of the chunk, counted from 0."""
    try:
        tree = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise _broken_line(chunk, number, line, error) from None
    where = f"{chunk.path}:{chunk.first_line + number}"
    if not isinstance(tree, dict):
        raise DataError(f'{where}: expected a JSON object like {{"{json_key}": "..."}}, found {type(tree).__name__}')
    if json_key not in tree:
        keys = ", ".join(list(tree)[:10]) or "none"
        raise DataError(f"{where}: no key {json_key!r}; the keys are: {keys}; choose one with --json-key")
    text = tree[json_key]
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        raise DataError(f"{where}: key {json_key!r}: expected a string, found {kind}; mend or remove the line")
    return text


def _broken_line(chunk: Chunk, number: int, line: bytes, error: orjson.JSONDecodeError) -> DataError:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as wrong:
        start = sum(len(before) + 1 for before in chunk.data.split(b"\n")[:number])
        return _not_utf8(chunk, wrong, number, start)
    return DataError(f"{chunk.path}:{chunk.first_line + number}: broken JSON ({error}); mend or remove the line")


def _not_utf8(chunk: Chunk, error: UnicodeDecodeError, number: int, start: int) -> DataError:
    """`start`: where the decoded bytes begin in the chunk; `number`: in which of its lines."""
    line = chunk.first_line + number + error.object[: error.start].count(b"\n")
    offset, byte = chunk.first_byte + start + error.start, error.object[error.start]
    return DataError(
        f"{chunk.path}:{line}: byte {offset} (0x{byte:02x}) is not UTF-8: {error.reason}; "
        "convert the file, for example with `iconv -f latin1 -t utf-8`"
    )
