"""All texts of some inputs, and what was left out of them, for the tests of readers."""

from __future__ import annotations

from pathlib import Path

from data_tools.readers import Chunk, LineNumbers, ReadOptions, Source, expand_inputs, parse_chunk, read_chunks


def texts_of(*paths: str | Path, **values: object) -> list[str]:
    """All texts; `values` are those of ReadOptions."""
    options = ReadOptions(**values)  # type: ignore[arg-type]
    chunks = read_chunks(expand_inputs(paths, options), options)
    return [text for chunk in chunks for text in parse_chunk(chunk, options).texts]


def rejects_of(*paths: str | Path, **values: object) -> tuple[list[str], list[tuple[str, int | None]], int]:
    """All texts, the reason and line of every reject, and how many texts were mended."""
    options = ReadOptions(**values)  # type: ignore[arg-type]
    texts, rejects, replaced, numbers = [], [], 0, LineNumbers()
    for chunk in read_chunks(expand_inputs(paths, options), options):
        parsed = parse_chunk(chunk, options)
        texts += parsed.texts
        rejects += [(reject.reason, reject.line) for reject in numbers.locate(parsed.rejects, parsed.lines)]
        replaced += parsed.replaced
    return texts, rejects, replaced


def cut_in_shards(
    sources: list[Source], options: ReadOptions, num_shards: int
) -> tuple[list[Chunk], list[list[Chunk]]]:
    """All chunks, and those of each shard; holds that the shards are the whole, and that it is continued anywhere."""
    whole = list(read_chunks(sources, options))
    shards = [list(read_chunks(sources, options, shard=(i, num_shards))) for i in range(num_shards)]
    assert [chunk for shard in shards for chunk in shard] == whole
    for place, chunk in enumerate(whole):
        assert list(read_chunks(sources, options, start=(chunk.source, chunk.number))) == whole[place:]
    return whole, shards
