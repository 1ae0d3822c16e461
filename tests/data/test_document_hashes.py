"""Hashes of documents: those of the xxhash library over int32 ids, for any dtype and any number of threads."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash

from pretrain.data.native import native


@pytest.mark.parametrize("dtype", ["uint16", "int32", "uint8", "int8", "int16", "int64"])
def test_hashes_equal_the_library_of_xxhash(dtype: str) -> None:
    generator = np.random.default_rng(1)
    lengths = [*range(70), 0, 0, 5000, 3, 2**20 + 9, 1]
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    tokens = generator.integers(0, 127, offsets[-1]).astype(dtype)
    found = [native().hash_documents(tokens, offsets, threads) for threads in (1, 2, 7)]
    expected = [
        xxhash.xxh64_intdigest(tokens[first:end].astype("<i4").tobytes())
        for first, end in zip(offsets, offsets[1:], strict=False)
    ]
    assert found[0].dtype == np.uint64
    for hashes in found:
        assert hashes.tolist() == expected


@pytest.mark.parametrize("offsets", [[0, 11], [-1, 3], [0, 5, 4], []])
def test_bad_offsets_are_refused(offsets: list) -> None:
    with pytest.raises(ValueError, match=r"offset|at least one entry"):
        native().hash_documents(np.zeros(10, np.uint16), np.array(offsets, np.int64), 1)
