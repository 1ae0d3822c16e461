"""Do the frames of a Zstandard file end where the file ends? The library does not say, so their headers are followed.

Layout (RFC 8878): a frame is a magic number, a header, blocks with 3 bytes of header each, and perhaps a checksum of 4
bytes; a skippable frame is a magic number, its length, and as many bytes.
"""

from __future__ import annotations

from typing import Protocol

_MAGIC = 0xFD2FB528
_SKIPPABLE = 0x184D2A50
_CONTENT_SIZE_BYTES = (0, 2, 4, 8)
_DICTIONARY_BYTES = (0, 1, 2, 4)


class _Readable(Protocol):
    def read(self, size: int = -1) -> bytes: ...


class FrameChecker:
    """A file whose `read` also follows the frames in what it gives."""

    def __init__(self, file: _Readable) -> None:
        self._file = file
        self._skip = 0  # bytes until the next header
        self._head = b""  # the part of a header that is there
        self._is_inside = False
        self._has_checksum = False

    def read(self, size: int = -1) -> bytes:
        """As the file's own."""
        data = self._file.read(size)
        self._follow(data)
        return data

    def require_end(self) -> None:
        """Raises EOFError: the bytes read so far do not end with a whole frame."""
        if self._is_inside or self._skip or self._head:
            raise EOFError("it ends inside a frame")

    def _follow(self, data: bytes) -> None:
        position = 0
        while position < len(data):
            if self._skip:
                step = min(self._skip, len(data) - position)
                self._skip -= step
                position += step
                continue
            wanted = self._header_bytes() - len(self._head)
            self._head += data[position : position + wanted]
            position += wanted
            if len(self._head) == self._header_bytes():
                self._take_header()

    def _header_bytes(self) -> int:
        """How many bytes the next header has, as far as its first bytes tell."""
        if self._is_inside:
            return 3
        return 5 if len(self._head) < 5 else 5 + self._rest_of_frame_header()

    def _rest_of_frame_header(self) -> int:
        magic, flags = int.from_bytes(self._head[:4], "little"), self._head[4]
        if magic & 0xFFFFFFF0 == _SKIPPABLE:
            return 3
        is_single_segment = flags >> 5 & 1
        content_size = _CONTENT_SIZE_BYTES[flags >> 6] or is_single_segment
        return (not is_single_segment) + _DICTIONARY_BYTES[flags & 3] + content_size

    def _take_header(self) -> None:
        head, self._head = self._head, b""
        if not self._is_inside:
            magic = int.from_bytes(head[:4], "little")
            if magic & 0xFFFFFFF0 == _SKIPPABLE:
                self._skip = int.from_bytes(head[4:8], "little")
            elif magic == _MAGIC:
                self._is_inside, self._has_checksum = True, bool(head[4] >> 2 & 1)
            return  # anything else the library refuses itself
        block = int.from_bytes(head, "little")
        is_last, kind, size = block & 1, block >> 1 & 3, block >> 3
        self._skip = 1 if kind == 1 else size  # a run-length block holds one byte
        if is_last:
            self._is_inside = False
            self._skip += 4 if self._has_checksum else 0
