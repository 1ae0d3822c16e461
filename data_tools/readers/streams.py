"""Cuts files that must be read from their start into blocks of whole documents: compressed files, files of records."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from data_tools.readers.chunks import Block, Source
from data_tools.readers.compression import read_blocks
from data_tools.readers.cutting import BOM, Scanner, cut_stream
from data_tools.readers.faults import Faults
from data_tools.readers.layouts import refuse_layout
from data_tools.readers.options import ReadOptions

Blocks = Iterator[tuple[bytes, int]]


def stream_blocks(
    source: Source,
    options: ReadOptions,
    scanner: Scanner,
    faults: Faults,
    change: Callable[[Blocks], Blocks] = lambda blocks: blocks,
) -> Iterator[tuple[Block, int]]:
    """Blocks of whole documents without a byte-order mark, and the bytes read on disk.

    `change` may exchange bytes before documents are looked for, not remove or add any.

    Raises:
        DamagedError: the file is truncated or damaged.
        DataError: it cannot be read, or is of another format or layout.
    """
    blocks = change(read_blocks(source.path, source.compression, options.chunk_bytes, options.max_ratio, source.kind))
    limit, end = options.max_document_bytes, 0
    for data, line, byte, progress in cut_stream(source.path, blocks, scanner, limit, faults.add, stops=faults.stops):
        end = byte + len(data)
        if byte == 0:
            if source.path == "-" or source.compression == "bz2":  # others were looked at before any work
                refuse_layout(source, options, data)
            data = data.removeprefix(BOM)
            byte = end - len(data)
        yield Block(data, line, byte), progress
    if end == 0 and not faults.rejects:
        name = "-: standard input" if source.path == "-" else source.path
        sys.stderr.write(f"note: {name} holds no document, as it is empty\n")
