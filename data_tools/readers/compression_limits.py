"""What compressed files ask for that is not given to them: windows of GiB, and dictionaries that are other files.

Such files are sound, so the error shows the program that unpacks them, not the advice for damaged ones.
"""

from __future__ import annotations

# The window of `zstd --long` (without a number), and of every level. zstd itself has this limit.
MAX_ZSTD_BYTES = 128 << 20
# An xz file declares how much memory it needs; `xz -9` needs 65 MiB.
MAX_XZ_BYTES = 512 << 20
_MAX_WINDOW_LOG = 31  # larger ones are not written by zstd: a damaged header
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_XZ_MAGIC = b"\xfd7zXZ\0"
_LZMA2 = 0x21


class UnreadError(Exception):
    """A sound file that is not read; `command` is the program that writes its content, `{file}` its name."""

    def __init__(self, message: str, command: str) -> None:
        super().__init__(message)
        self.command = command


def require_zstd(header: bytes) -> None:
    """Raises UnreadError: the frame that begins with `header` needs a dictionary or too large a window."""
    if not header.startswith(_ZSTD_MAGIC) or len(header) < 6:
        return
    flags = header[4]
    is_single = bool(flags & 0x20)
    position = 5 if is_single else 6
    id_bytes = (0, 1, 2, 4)[flags & 3]
    dictionary = int.from_bytes(header[position : position + id_bytes], "little")
    if dictionary:
        words = f"was compressed with a dictionary (number {dictionary}), which is another file"
        raise UnreadError(words, "zstd -dc -D DICTIONARY {file}")
    if is_single:  # the window is the content, of this size
        position += id_bytes
        size_bytes = 1 << (flags >> 6)
        window = int.from_bytes(header[position : position + size_bytes], "little")
    else:
        log = 10 + (header[5] >> 3)
        window = (1 << log) + (1 << log) // 8 * (header[5] & 7)
    if MAX_ZSTD_BYTES < window <= (1 << _MAX_WINDOW_LOG):
        needed = max(window - 1, 1).bit_length()
        words = f"needs a window of {_size(window)}, more than {_size(MAX_ZSTD_BYTES)}"
        raise UnreadError(words, f"zstd -dc --long={needed} {{file}}")


def require_xz(header: bytes) -> None:
    """Raises UnreadError: the first block of the stream that begins with `header` needs too much memory."""
    if not header.startswith(_XZ_MAGIC) or len(header) < 14 or not header[12]:
        return
    flags, position = header[13], 14
    for flag in (0x40, 0x80):  # the compressed and the uncompressed size may follow
        if flags & flag:
            _, position = _number(header, position)
    for _ in range((flags & 3) + 1):
        filter_id, position = _number(header, position)
        num_bytes, position = _number(header, position)
        if filter_id == _LZMA2 and position < len(header) and header[position] <= 40:
            bits = header[position]
            size = (1 << 32) - 1 if bits == 40 else (2 | bits & 1) << (bits // 2 + 11)
            if size >= MAX_XZ_BYTES:
                words = f"needs {_size(size)} of memory, more than {_size(MAX_XZ_BYTES)}"
                raise UnreadError(words, "xz -dc {file}")
        position += num_bytes


def _number(data: bytes, position: int) -> tuple[int, int]:
    """The number of seven bits per byte at `position`, and the position behind it."""
    value = shift = 0
    while position < len(data) and shift < 63:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            break
    return value, position


def _size(num_bytes: int) -> str:
    for unit, shift in (("GiB", 30), ("MiB", 20)):
        if num_bytes >= 1 << shift:
            return f"{round(num_bytes / (1 << shift), 2):g} {unit}"
    return f"{num_bytes} bytes"
