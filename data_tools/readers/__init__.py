"""Reads documents from corpora: the first step of the flow, one module per format.

`expand_inputs` finds the sources, `read_chunks` cuts them into chunks of whole documents, `parse_chunk` returns the
texts of a chunk, in any process. `ReadOptions` configures all of it; `LineNumbers` adds line numbers to rejects.
"""

from data_tools.readers.chunks import Chunk, ParsedChunk, Reject, Source
from data_tools.readers.faults import LineNumbers
from data_tools.readers.options import ReadOptions
from data_tools.readers.reading import parse_chunk, read_chunks, total_progress
from data_tools.readers.sources import expand_inputs, named_files, require_unchanged

__all__ = [
    "Chunk",
    "LineNumbers",
    "ParsedChunk",
    "ReadOptions",
    "Reject",
    "Source",
    "expand_inputs",
    "named_files",
    "parse_chunk",
    "read_chunks",
    "require_unchanged",
    "total_progress",
]
