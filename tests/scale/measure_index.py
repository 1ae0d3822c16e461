"""The sample index at 10^9 rows and the order at 10^12 samples: seconds, bytes, nanoseconds per look-up.

    python tests/scale/measure_index.py --documents 100000000 --tokens 5100

The documents are only offsets, of which an index is made; no token is stored. Prints one line of JSON per row mode.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import numpy as np

from pretrain.data.order import permute
from pretrain.data.sample_index import RowIndex

LOOK_UPS = 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--documents", type=int, default=100_000_000)
    parser.add_argument("--tokens", type=int, default=5_100, help="per document, on average")
    parser.add_argument("--seq-length", type=int, default=512)
    arguments = parser.parse_args()
    generator = np.random.default_rng(1)
    offsets = np.zeros(arguments.documents + 1, np.int64)
    for first in range(0, arguments.documents, 1 << 20):  # in pieces, for the sake of memory
        part = offsets[first + 1 : first + 1 + (1 << 20)]
        np.cumsum(generator.integers(1, 2 * arguments.tokens, part.size), out=part)
        part += offsets[first]
    for mode in ("stream", "document"):
        print(json.dumps(measure(mode, offsets, arguments.seq_length)), flush=True)
    positions = generator.integers(0, 10**12, LOOK_UPS)
    print(
        json.dumps(
            {"order_of": 10**12, "nanoseconds_per_look_up": nanoseconds(lambda: permute(1, 0, positions, 10**12))}
        )
    )


def measure(mode: str, offsets: np.ndarray, seq_length: int) -> dict[str, object]:
    """Builds one index and looks a million random rows up."""
    start = time.process_time()
    index = RowIndex(mode, offsets, seq_length)  # type: ignore[arg-type]
    seconds = time.process_time() - start
    rows = np.random.default_rng(2).integers(0, index.num_rows, LOOK_UPS)
    return {
        "mode": mode,
        "documents": offsets.size - 1,
        "tokens": int(offsets[-1]),
        "rows": index.num_rows,
        "cpu_seconds": round(seconds, 2),
        "index_bytes": index.memory_bytes,
        "bytes_per_row": round(index.memory_bytes / index.num_rows, 2),
        "nanoseconds_per_look_up": nanoseconds(lambda: index.first_tokens(rows)),
        "peak_bytes_of_the_process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def nanoseconds(action: object) -> float:
    start = time.process_time()
    action()  # type: ignore[operator]
    return round((time.process_time() - start) / LOOK_UPS * 1e9, 1)


if __name__ == "__main__":
    main()
