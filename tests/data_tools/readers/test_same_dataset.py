"""The same documents give the same dataset, byte for byte, whatever the format and the number of workers."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import run_program, write_bytes, write_jsonl, write_vocab

TEXTS = [f"the cat {'sat ' * (number % 9)}on mat {number}" for number in range(300)]
CSV = "".join(f'{number},"{text}"\n' for number, text in enumerate(TEXTS))


def write_inputs(folder: Path) -> dict[str, list[object]]:
    """Arguments of the program for every format."""
    table = pa.table({"meta": [{"text": text} for text in TEXTS]})
    pq.write_table(table, folder / "x.parquet", row_group_size=64)
    with pa.ipc.new_stream(folder / "x.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=50)
    records = [
        f"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: {len(text)}\r\n\r\n{text}\r\n\r\n" for text in TEXTS
    ]
    halves = [
        write_jsonl(folder / f"{half}.jsonl{suffix}", TEXTS[half : half + 150])
        for half, suffix in ((0, ".xz"), (150, ""))
    ]
    (folder / "list.txt").write_text("\n".join(map(str, halves)))
    return {
        "jsonl": [write_jsonl(folder / "x.jsonl", TEXTS)],
        "jsonl.zst": [write_jsonl(folder / "x.jsonl.zst", TEXTS)],
        "list": [f"@{folder / 'list.txt'}"],
        "txt": [write_bytes(folder / "x.txt.bz2", "\n\n".join(TEXTS).encode())],
        "lines": [write_bytes(folder / "lines.txt", "\n".join(TEXTS).encode()), "--text-documents", "line"],
        "csv": [write_bytes(folder / "x.csv.gz", f"id,text\n{CSV}".encode())],
        "headless": [write_bytes(folder / "y.csv", CSV.encode()), "--no-header", "--text-column", "2"],
        "tsv": [write_bytes(folder / "x.tsv", ("text\n" + "\n".join(TEXTS)).encode())],
        "parquet": [folder / "x.parquet", "--json-key", "meta.text"],
        "arrow": [folder / "x.arrow", "--json-key", "meta.text"],
        "wet": [write_bytes(folder / "x.warc.wet.gz", "".join(records).encode())],
    }


@pytest.mark.slow
def test_every_format_gives_the_same_dataset(tmp_path: Path):
    vocab, first = write_vocab(tmp_path), None
    for number, (name, arguments) in enumerate(write_inputs(tmp_path).items()):
        prefix = tmp_path / f"out-{name}"
        workers = 2 if number % 4 == 1 else 1
        done = run_program(
            "preprocess", "--input", *arguments, "--tokenizer", vocab, "--output-prefix", prefix, "--workers", workers
        )
        assert done.returncode == 0, done.stderr
        data = [prefix.with_name(prefix.name + suffix).read_bytes() for suffix in (".bin", ".idx")]
        first = first or data
        assert data == first, name
