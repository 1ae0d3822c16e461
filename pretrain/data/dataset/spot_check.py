"""A look at the content of datasets at every start of a run: `taco data verify` reads all of it, this reads a little.

Sizes, and the fields of the index, are checked whenever a dataset is opened. Other tokens in a file of the same size
are not: a copy that was cut off and filled with zeros, or PREFIX.bin of another version. So PREFIX.idx is hashed, and
of PREFIX.bin the first, the last and a random chunk (64 MiB each): about 0.1 s per dataset from memory, and what the
file system takes to read 192 MiB otherwise.
"""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from pretrain.data.dataset.indexed_dataset import IndexedDataset
from pretrain.data.dataset.manifest import REMEDY
from pretrain.durable import hash_range
from pretrain.parallel import collectives
from pretrain.runlog import get_logger

_THREADS = 4

log = get_logger(__name__)


def find_damage_on_nodes(datasets: Sequence[IndexedDataset]) -> str | None:
    """The first difference that any node sees, the same on all ranks; one rank per node looks. Collective."""
    host = socket.gethostname()
    problem = None
    if collectives.gather_objects(host).index(host) == collectives.rank():
        start = time.monotonic()
        distinct = list({dataset.prefix: dataset for dataset in datasets}.values())
        with ThreadPoolExecutor(min(_THREADS, len(distinct)), thread_name_prefix="taco-spot-check") as executor:
            problems = executor.map(find_difference, distinct)
            problem = next((text for text in problems if text is not None), None)
        if problem is not None and collectives.rank() != 0:
            problem = f"on {host}: {problem}"
        seconds = time.monotonic() - start
        log.info("data: content of %d datasets compared with their hashes in %.1f s", len(distinct), seconds)
    return next((text for text in collectives.gather_objects(problem) if text is not None), None)


def find_difference(
    dataset: IndexedDataset, draw: Callable[[int], int] = random.SystemRandom().randrange
) -> str | None:
    """The first difference between a dataset and the hashes in its manifest; None if there is none or no manifest.

    Args:
        draw: gives the number of the random chunk, below that of all chunks.
    """
    manifest = dataset.manifest
    if manifest is None:
        return None
    remedy = f"`taco data verify {dataset.prefix}` finds all differences; {REMEDY}"
    num_chunks = len(manifest.bin_xxh64)
    chunks = sorted({0, num_chunks - 1, draw(num_chunks)}) if num_chunks else []
    if len(chunks) < num_chunks:
        log.info("%s: chunks %s of %d are compared with their hashes", dataset.prefix, chunks, num_chunks)
    parts = [(dataset.idx_path, "", 0, manifest.idx_bytes, manifest.idx_xxh64)]
    for number in chunks:
        first = number * manifest.chunk_bytes
        end = min(first + manifest.chunk_bytes, manifest.bin_bytes)
        parts.append((dataset.bin_path, f"chunk {number}, ", first, end, manifest.bin_xxh64[number]))
    for path, name, first, end, expected in parts:
        where = f"{path}: {name}bytes {first} to {end}"
        try:
            found = hash_range(path, first, end)
        except OSError as error:
            return f"{where}: cannot be read: {error.strerror or error}"
        if found != expected:
            return f"{where}: differ from what was written (expected xxh64 {expected}, found {found}); {remedy}"
    return None
