"""Cuts sources into chunks, always the same ones, for any number of workers, parts (shards) and interruptions.

Reading has two halves, so that many workers can share one corpus: `read_chunks` cuts (one process, little work),
`parse_chunk` returns the texts of a chunk (any process).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

from data_tools.readers.arrow_files import cut_arrow, parse_arrow
from data_tools.readers.byte_ranges import cut_file, read_documents
from data_tools.readers.chunks import Block, Chunk, FileRange, LineSpan, ParsedChunk, Piece, Source, Values
from data_tools.readers.compression import DamagedError
from data_tools.readers.cutting import BOM, Rule, RuleScanner
from data_tools.readers.delimited import cut_delimited, parse_delimited
from data_tools.readers.faults import Faults, count_lines, damaged_file
from data_tools.readers.hub import cut_hub_rows, parse_hub_rows
from data_tools.readers.json_lines import parse_json_lines
from data_tools.readers.options import ReadOptions
from data_tools.readers.parquet_files import cut_parquet, parse_parquet
from data_tools.readers.plain_text import parse_text
from data_tools.readers.streams import stream_blocks
from data_tools.readers.web_text import cut_web_text, parse_web_text
from pretrain.errors import ConfigError


def read_chunks(
    sources: Sequence[Source],
    options: ReadOptions | None = None,
    *,
    shard: tuple[int, int] = (0, 1),
    start: tuple[int, int] | None = None,
) -> Iterator[Chunk]:
    """Cuts all sources, in order, into chunks of whole documents, of about `options.chunk_bytes` each.

    `shard` (i, n) selects the chunks that begin in the i-th of n equal parts of the input, by bytes on disk; a file
    that can only be read from its start belongs to one part. `start` (source, chunk) is the first chunk to return.

    Raises:
        ConfigError: a shard or a start is given with standard input, which cannot be read twice.
        DataError: a source cannot be read; with `on_error="stop"`, also if it is damaged, empty after decompression, or
            holds a document that is too long.
    """
    options = options or ReadOptions()
    index, num_shards = shard
    if not 0 <= index < num_shards:
        raise ConfigError(f"shard {index} of {num_shards}: expected a number from 0 to {num_shards - 1}")
    if (num_shards > 1 or start) and any(source.path == "-" for source in sources):
        raise ConfigError("-: standard input cannot be divided or resumed; write it to a file first")
    first_source, first_chunk = start or (0, 0)
    before, total = 0, sum(source.num_bytes for source in sources)
    for number, source in enumerate(sources):
        if number >= first_source:
            first = first_chunk if number == first_source else 0
            shard_of = _ShardOf(before, source.num_bytes, total, num_shards)
            yield from _source_chunks(number, source, options, first, index, shard_of)
        before += source.num_bytes


@dataclass(frozen=True)
class _ShardOf:
    """Maps a byte of one source to its part of the input."""

    before: int
    num_bytes: int
    total: int
    num_shards: int

    def __call__(self, start: int) -> int:
        # An offset at the end of a source counts as its last byte.
        place = self.before + max(min(start, self.num_bytes - 1), 0)
        return place * self.num_shards // self.total if self.total else 0


def _source_chunks(
    number: int, source: Source, options: ReadOptions, first: int, index: int, shard_of: Callable[[int], int]
) -> Iterator[Chunk]:
    if shard_of(0) > index or shard_of(source.num_bytes) < index:
        return
    is_whole = not _is_divisible(source, options)
    if is_whole and shard_of(0) != index:
        return
    for count, piece in _pieces(source, options, first):
        part = index if is_whole else shard_of(piece.start)
        if part > index:
            return
        if part == index:
            yield Chunk(number, count, source.path, source.kind, piece.place, piece.end, tuple(piece.faults))


def _is_divisible(source: Source, options: ReadOptions) -> bool:
    is_file = source.kind == "txt" and options.text_documents == "file"
    if source.kind in ("parquet", "arrow"):
        return True
    return source.kind in ("jsonl", "txt") and not source.compression and source.path != "-" and not is_file


def total_progress(sources: Sequence[Source], chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """The same chunks, with `progress` counted over all sources."""
    before = list(accumulate((source.num_bytes for source in sources), initial=0))
    for chunk in chunks:
        yield replace(chunk, progress=before[chunk.source] + chunk.progress)


def _pieces(source: Source, options: ReadOptions, first: int) -> Iterator[tuple[int, Piece]]:
    """The chunks of one source with their numbers, starting with number `first`."""
    if source.kind in ("jsonl", "txt") and _is_divisible(source, options):
        for count, place in enumerate(cut_file(source.num_bytes, options.chunk_bytes, first), start=first):
            yield count, Piece(place, place.start, place.end)
        return
    for count, piece in enumerate(_until_damage(source, options)):
        if count >= first:
            yield count, piece


def _until_damage(source: Source, options: ReadOptions) -> Iterator[Piece]:
    """The chunks of a source that is read from its start; a fault that ends it gives one more chunk."""
    faults = Faults(options.on_error)
    try:
        for piece in _CUTTERS[source.kind](source, options, faults):
            piece.faults += faults.take()
            yield piece
    except DamagedError as error:
        if options.on_error == "stop":
            raise
        faults.add(damaged_file(source.path, error, error.num_bytes))
    if faults.rejects:
        yield Piece(Values((), 0), source.num_bytes, source.num_bytes, faults.take())


def _line_pieces(source: Source, options: ReadOptions, faults: Faults) -> Iterator[Piece]:
    """Chunks of JSON lines or text, from a stream of bytes."""
    for block, progress in stream_blocks(source, options, RuleScanner(_rule(source.kind, options)), faults):
        yield Piece(block, 0, progress)


def _rule(kind: str, options: ReadOptions) -> Rule:
    if kind == "txt" and options.text_documents == "file":
        return Rule("never")
    return Rule("blank-line" if kind == "txt" and options.text_documents == "blank-line" else "line")


def parse_chunk(chunk: Chunk, options: ReadOptions | None = None) -> ParsedChunk:
    """The texts of the documents in `chunk`, in order, and what was left out.

    Raises:
        DataError: with `on_error="stop"`, the first fault: invalid UTF-8, a broken JSON line, a missing key, a value
            that is not a string. The file cannot be read, or has changed.
    """
    options = options or ReadOptions()
    if isinstance(chunk.place, FileRange):
        return _parse_range(chunk, chunk.place, options)
    faults = Faults(options.on_error)
    for fault in chunk.faults:
        faults.add(fault)
    if isinstance(chunk.place, Block):
        texts = _PARSERS[chunk.kind](chunk.path, chunk.place, options=options, faults=faults)
        return ParsedChunk(texts, faults.rejects, len(chunk.place.data), faults.replaced)
    if isinstance(chunk.place, Values):
        texts, num_bytes = parse_hub_rows(chunk.path, chunk.place, options, faults)
    else:
        parse = parse_parquet if chunk.kind == "parquet" else parse_arrow
        texts, num_bytes = parse(chunk.path, chunk.place, options, faults)
    return ParsedChunk(texts, faults.rejects, num_bytes, faults.replaced)


def _parse_range(chunk: Chunk, place: FileRange, options: ReadOptions) -> ParsedChunk:
    rule = _rule(chunk.kind, options)
    data, begin, too_long = read_documents(chunk.path, place, rule, options.max_document_bytes)
    if not data and not too_long:
        return ParsedChunk()
    faults = Faults(options.on_error, lambda: count_lines(chunk.path, 0, begin))
    num_lines, num_bytes = data.count(b"\n"), len(data)
    body = data.removeprefix(BOM) if begin == 0 else data
    block = Block(body, 1, begin + num_bytes - len(body))
    texts = _PARSERS[chunk.kind](chunk.path, block, options=options, faults=faults)
    for fault in too_long:
        faults.add(fault)
    span = LineSpan(chunk.path, begin, begin + num_bytes, num_lines)
    return ParsedChunk(texts, faults.rejects, num_bytes, faults.replaced, span)


_CUTTERS: dict[str, Callable[[Source, ReadOptions, Faults], Iterator[Piece]]] = {
    "jsonl": _line_pieces,
    "txt": _line_pieces,
    "csv": cut_delimited,
    "tsv": cut_delimited,
    "wet": cut_web_text,
    "parquet": cut_parquet,
    "arrow": cut_arrow,
    "hub": cut_hub_rows,
}
_PARSERS: dict[str, Callable[..., list[str]]] = {
    "jsonl": parse_json_lines,
    "txt": parse_text,
    "csv": partial(parse_delimited, kind="csv"),
    "tsv": partial(parse_delimited, kind="tsv"),
    "wet": parse_web_text,
}
