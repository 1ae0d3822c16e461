"""Cuts files that must be read from their start into blocks of whole documents: compressed files, files of records."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from data_tools.readers.chunks import Block, Source
from data_tools.readers.compression import DamagedError, read_blocks
from data_tools.readers.cutting import BOM, Scanner, cut_stream, is_utf16
from data_tools.readers.faults import Faults
from data_tools.readers.options import ReadOptions

_UTF16 = "is UTF-16; convert it, for example with `iconv -f utf-16 -t utf-8`"


def stream_blocks(
    source: Source, options: ReadOptions, scanner: Scanner, faults: Faults
) -> Iterator[tuple[Block, int]]:
    """Blocks of whole documents without a byte-order mark, and the bytes read on disk.

    Raises:
        DamagedError: the file is truncated, damaged, or holds UTF-16.
        DataError: it cannot be read.
    """
    blocks = read_blocks(source.path, source.compression, options.chunk_bytes, options.max_ratio)
    end = 0
    for data, line, byte, progress in cut_stream(source.path, blocks, scanner, options.max_document_bytes, faults.add):
        end = byte + len(data)
        if byte == 0:
            if is_utf16(data):
                raise DamagedError(f"{source.path}: {_UTF16}", 0)
            data = data.removeprefix(BOM)
            byte = end - len(data)
        yield Block(data, line, byte), progress
    if end == 0 and not faults.rejects:
        name = "-: standard input" if source.path == "-" else source.path
        sys.stderr.write(f"note: {name} holds no document, as it is empty\n")
