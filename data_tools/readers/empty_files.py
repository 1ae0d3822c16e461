"""Which files hold no document, of whatever kind: no bytes, a byte-order mark or a header alone, a table without rows.

Only small files are opened: a large one holds something.
"""

from __future__ import annotations

from data_tools.readers.arrow_files import cut_arrow
from data_tools.readers.chunks import Source
from data_tools.readers.compression import read_blocks
from data_tools.readers.cutting import BOM
from data_tools.readers.faults import Faults
from data_tools.readers.options import ReadOptions
from data_tools.readers.parquet_files import cut_parquet
from pretrain.errors import DataError

_MOST_PLAIN, _MOST_PACKED, _MOST_HEADER, _MOST_TABLE = len(BOM), 1 << 10, 1 << 12, 1 << 20
_BLOCK = 1 << 14


def is_empty(source: Source, options: ReadOptions) -> bool:
    """Whether the file holds no document; False for one that cannot be read, which is reported where it is read."""
    size, kind = source.num_bytes, source.kind
    if size == 0:
        return True
    try:
        if kind in ("parquet", "arrow"):
            cut = cut_parquet if kind == "parquet" else cut_arrow
            return size <= _MOST_TABLE and next(cut(source, options, Faults("stop")), None) is None
        is_table = kind in ("csv", "tsv") and options.has_header
        if size > (_MOST_HEADER if is_table else _MOST_PACKED if source.compression else _MOST_PLAIN):
            return False
        blocks = read_blocks(source.path, source.compression, _BLOCK)
        data, rest = next(blocks, (b"", 0))[0], next(blocks, None)
    except DataError:
        return False
    text = data.removeprefix(BOM)
    return rest is None and (not text or (is_table and not {*b"\r\n"} & {*text.strip(b"\r\n")}))
