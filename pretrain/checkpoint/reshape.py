"""Rewrites a checkpoint as a given number of files with the same state, or as weights only.

No layout needs this, since each reads every checkpoint (`state_files.py`). It is for people: one file to archive or to
inspect, or weights without optimizer state to start other runs from.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pretrain.checkpoint.manifest import load_verified
from pretrain.checkpoint.state_files import (
    MOMENTS,
    WEIGHT,
    Range,
    StateReader,
    read_counters,
    write_counters,
    write_state,
)
from pretrain.checkpoint.store import CheckpointStore
from pretrain.checkpoint.weights import read_weights, write_weights
from pretrain.durable import FileRecord
from pretrain.errors import CheckpointError
from pretrain.model.parameter_shape import ParameterShape


def reshape_checkpoint(source: Path, out: Path, *, num_files: int, weights_only: bool) -> Path:
    """Rewrite the checkpoint folder `source` below `out`, a new folder; returns the new checkpoint's folder.

    Raises:
        CheckpointError: the source is damaged, or `out` exists or cannot be written.
    """
    if out.exists():
        raise CheckpointError(f"{out}: exists; choose a new folder")
    manifest = load_verified(source)
    if manifest.kind == "weights" and not weights_only:
        raise CheckpointError(f"{source}: holds weights only, in one file; there is nothing to reshape")
    extras = [path for path in (source / "config.yaml", source / "tokenizer") if path.exists()]
    store = CheckpointStore(out, keep=1)
    try:
        store.prepare()
        if weights_only:
            weights_manifest = replace(manifest, kind="weights", files=())
            return store.save(weights_manifest, lambda folder: [write_weights(folder, read_weights(source))], extras)
        return store.save(replace(manifest, files=()), lambda folder: _write_files(source, folder, num_files), extras)
    except CheckpointError:
        shutil.rmtree(out, ignore_errors=True)
        raise


def _write_files(source: Path, folder: Path, num_files: int) -> list[FileRecord]:
    with StateReader(source) as reader:
        whole = {name: ParameterShape(shape.full) for name, shape in reader.shapes.items()}
        records = [
            write_state(folder, number, ranges, lambda part: reader.read_range(part, whole[part.name]), whole)
            for number, ranges in enumerate(_split_evenly(whole, num_files))
        ]
    return [*records, write_counters(folder, read_counters(source))]


def _split_evenly(shapes: dict[str, ParameterShape], num_files: int) -> Iterator[list[Range]]:
    """For each file an equal share of all elements, in the order of the names."""
    sizes = {name: shape.num_elements for name, shape in sorted(shapes.items())}
    total = sum(sizes.values())
    for number in range(num_files):
        first, last = total * number // num_files, total * (number + 1) // num_files
        ranges, begin = [], 0
        for name, size in sizes.items():
            start, stop = max(first - begin, 0), min(last - begin, size)
            begin += size
            if start < stop:
                ranges += [Range(kind, name, 0, 1, start, stop - start) for kind in (WEIGHT, *MOMENTS)]
        yield ranges
