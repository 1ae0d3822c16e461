"""Decompresses files in blocks of one size: memory is bounded, whatever a malicious file decompresses to.

gzip, Zstandard, bzip2 and xz, each with any number of concatenated members. A truncated or damaged file is an error
that names the file and how far it could be read.
"""

from __future__ import annotations

import bz2
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from data_tools.readers.compression_limits import MAX_XZ_BYTES, UnreadError, require_xz, require_zstd
from data_tools.readers.formats import HEAD_BYTES, piped, refuse_other_format
from data_tools.readers.options import Compression, Kind
from pretrain.errors import DataError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    import backports.zstd as zstd  # this form: ModuleNotFoundError then names the missing package

SUFFIXES: dict[str, Compression] = {".gz": "gz", ".zst": "zst", ".bz2": "bz2", ".xz": "xz"}
_READ_BYTES = 1 << 18
# Less than this is lost before the damage in a damaged file.
_PIECE_BYTES = 1 << 18
_DAMAGE = (EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError, OSError)
# The ratio is not checked below this size: only long output can do harm.
_RATIO_FREE_BYTES = 64 << 20
# A frame or stream declares its needs in fewer bytes than these.
_HEADER_BYTES = 64


class DamagedError(DataError):
    """A file is truncated, damaged, or decompresses to too much; what was read before is intact.

    `num_bytes`: decompressed bytes before the damage, if known.
    """

    def __init__(self, message: str, num_bytes: int | None) -> None:
        super().__init__(message)
        self.num_bytes = num_bytes


def open_input(path: str) -> BinaryIO:
    """Opens the file `path`, or standard input for `-`. Raises DataError: it cannot be opened."""
    try:
        return Path("/dev/stdin").open("rb") if path == "-" else Path(path).open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def read_blocks(
    path: str, compression: Compression, block_bytes: int, max_ratio: int = 0, kind: Kind = "jsonl"
) -> Iterator[tuple[bytes, int]]:
    """Blocks of exactly `block_bytes` of the decompressed file (the last may be shorter), with the bytes read on disk.

    `kind`: what the file holds, for the remedy in messages.

    Raises:
        DamagedError: the file is truncated, damaged, or decompresses to more than `max_ratio` times its size.
        DataError: it cannot be read, is of another format, or needs a dictionary or too much memory.
    """
    done = 0
    name = SUFFIX_OF.get(compression, "")
    with open_input(path) as file:
        counted = _Counted(file)
        pieces = _OPENERS[compression](counted, min(block_bytes, _PIECE_BYTES) if compression else block_bytes)
        try:
            refuse_other_format(path, counted.first(HEAD_BYTES), kind, compression)
            for block in _gather(pieces, block_bytes):
                done += len(block)
                if max_ratio and done > max(_RATIO_FREE_BYTES, max_ratio * counted.num_bytes):
                    raise DamagedError(
                        f"{path}: unfolds to more than {max_ratio} times its size, as decompression bombs do "
                        f"({counted.num_bytes} bytes gave {done}); raise --max-ratio if it is sound",
                        done,
                    )
                yield block, counted.num_bytes
        except DataError:
            raise
        except UnreadError as error:
            raise DataError(f"{path}: {error}; {piped(path, error.command, kind)}") from None
        except _DAMAGE as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise DataError(f"{path}: cannot be read: {error.strerror}") from None
            raise DamagedError(
                f"{path}: damaged or truncated {name} file ({error}) after {done} decompressed bytes, "
                f"near byte {counted.num_bytes} on disk; fetch it again",
                done,
            ) from None


class _Counted:
    """A file that counts the bytes read from it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.num_bytes, self._first = file, 0, b""

    def first(self, size: int) -> bytes:
        """The first bytes of the file, which `read` returns again; standard input cannot be read twice."""
        self._first = self._file.read(size)
        return self._first

    def read(self, size: int) -> bytes:
        data, self._first = self._first[:size], self._first[size:]
        if len(data) < size:
            data += self._file.read(size - len(data))
        self.num_bytes += len(data)
        return data


class _Decompressor(Protocol):
    """The common interface of the decompressors of bz2, lzma and zstd, and of `_Gzip`."""

    eof: bool
    needs_input: bool
    unused_data: bytes

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    """One gzip member with the interface of bz2's decompressor."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        block = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        # After a full block zlib may still hold output, although it consumed all input.
        self.needs_input = not self._inner.unconsumed_tail and len(block) < max_length
        return block


def _plain(file: _Counted, block_bytes: int) -> Iterator[bytes]:
    while block := file.read(block_bytes):
        yield block


def _members(
    new: Callable[[], Any], require: Callable[[bytes], None] = lambda header: None
) -> Callable[[_Counted, int], Iterator[bytes]]:
    """A reader of concatenated members; there may be zeros between and after them, as from tapes and block devices.

    `require` raises UnreadError for the first bytes of a member that is not read.
    """

    def read(file: _Counted, block_bytes: int) -> Iterator[bytes]:
        data, is_first = file.read(_READ_BYTES), True
        while data:
            if len(data) < _HEADER_BYTES:
                data += file.read(_READ_BYTES)
            require(data)
            member: _Decompressor = new()
            has_output = False
            while not member.eof:
                try:
                    piece = member.decompress(data, block_bytes)
                except _DAMAGE as error:
                    if is_first or has_output:
                        raise
                    raise EOFError(f"what follows its last whole member is of another format: {error}") from None
                yield piece
                data, has_output = b"", has_output or bool(piece)
                if member.needs_input and not member.eof:
                    data = file.read(_READ_BYTES)
                    if not data:
                        raise EOFError("it ends inside a member")
            is_first = False
            data = member.unused_data.lstrip(b"\0")
            while not data and (more := file.read(_READ_BYTES)):
                data = more.lstrip(b"\0")

    return read


def _gather(pieces: Iterator[bytes], block_bytes: int) -> Iterator[bytes]:
    """Joins pieces of any size and cuts them into blocks of one size: chunk borders must not depend on libraries.

    Data before an error is yielded before the error is raised.
    """
    gathered: list[bytes] = []
    num_bytes = 0
    failure: Exception | None = None
    try:
        for piece in pieces:
            gathered.append(piece)
            num_bytes += len(piece)
            if num_bytes >= block_bytes:
                data = b"".join(gathered) if len(gathered) > 1 else piece
                end = num_bytes - num_bytes % block_bytes
                for start in range(0, end, block_bytes):
                    yield data[start : start + block_bytes]
                gathered, num_bytes = [data[end:]], num_bytes - end
    except _DAMAGE as error:
        failure = error
    if num_bytes:
        yield b"".join(gathered)
    if failure is not None:
        raise failure


_OPENERS: dict[str, Callable[[_Counted, int], Iterator[bytes]]] = {
    "": _plain,
    "gz": _members(_Gzip),
    "bz2": _members(bz2.BZ2Decompressor),
    "xz": _members(lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, MAX_XZ_BYTES), require_xz),
    "zst": _members(zstd.ZstdDecompressor, require_zstd),
}
SUFFIX_OF = {compression: suffix for suffix, compression in SUFFIXES.items()}
