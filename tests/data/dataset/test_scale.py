"""Beyond 32 bits: files of 2^33 bytes, more than 2^31 documents, orders of 10^12 samples, in little memory.

The files are sparse: holes read as token 0, and a few tokens with names of their own stand where 32 bits end.
"""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hostile_files import HEADER
from plain_versions import Permutation

from pretrain.data.dataset.indexed_dataset import IndexedDataset
from pretrain.data.order import permute
from pretrain.data.sample_index import RowIds, RowIndex

NUM_BYTES = 2**33
CODES = {"uint16": 8, "int32": 4}
SEQ_LENGTH = 512
IDS = RowIds(vocab_size=30_000, cls=2, sep=3, pad=1)
PEAK_BYTES = 600_000_000  # of the whole process, most of it imports; the file is 14 times as large


def lengths_of(num_tokens: int) -> np.ndarray:
    """Documents of 1,000 to 3,000,000 tokens, some of whose borders are the places where 32 bits end."""
    generator = np.random.default_rng(5)
    borders = np.cumsum(generator.integers(1_000, 3_000_000, num_tokens // 1_000_000))
    special = [2**31 - 1, 2**31, 2**31 + 1, 2**31 + 2, 2**30, 2**30 + 1]
    borders = np.unique([*borders[borders < num_tokens], *special, 0, num_tokens])
    return np.diff(borders[borders <= num_tokens])


def marked_places(num_tokens: int, itemsize: int) -> list[int]:
    """Tokens round the first and last place, 2^31 tokens, and the bytes 2^31 and 2^32."""
    centres = [0, 2**31, 2**31 // itemsize, 2**32 // itemsize, num_tokens - 1]
    places = {centre + step for centre in centres for step in (-2, -1, 0, 1, 2)}
    return sorted(place for place in places if 0 <= place < num_tokens)


def write_sparse(prefix: Path, dtype: str) -> dict[int, int]:
    """A dataset of NUM_BYTES bytes; returns which token stands at which of the marked places."""
    itemsize = np.dtype(dtype).itemsize
    lengths = lengths_of(NUM_BYTES // itemsize)
    pointers = np.concatenate(([0], np.cumsum(lengths)[:-1])) * itemsize
    header = HEADER.pack(b"MMIDIDX\0\0", 1, CODES[dtype], len(lengths), len(lengths) + 1)
    tables = [lengths.astype("<i4"), pointers.astype("<i8"), np.arange(len(lengths) + 1, dtype="<i8")]
    Path(f"{prefix}.idx").write_bytes(header + b"".join(table.tobytes() for table in tables))
    marks = {place: 100 + number for number, place in enumerate(marked_places(NUM_BYTES // itemsize, itemsize))}
    with open(f"{prefix}.bin", "wb") as file:
        try:
            os.truncate(file.fileno(), NUM_BYTES)
        except OSError as error:
            if error.errno in (errno.EFBIG, errno.ENOSPC, errno.EINVAL):
                pytest.skip(f"no file of {NUM_BYTES} bytes can be made here: {error.strerror}")
            raise
        for place, token in marks.items():
            os.pwrite(file.fileno(), np.array(token, dtype).tobytes(), place * itemsize)
    if os.stat(f"{prefix}.bin").st_blocks * 512 > 2**28:
        pytest.skip("this file system writes holes to the disk")
    return marks


@pytest.fixture(params=["uint16", "int32"])
def sparse(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[int, int]]:
    return tmp_path / "big", write_sparse(tmp_path / "big", request.param)


@pytest.mark.fault("data-limits")
@pytest.mark.slow
def test_documents_of_a_file_beyond_32_bits(sparse: tuple[Path, dict[int, int]]) -> None:
    prefix, marks = sparse
    dataset = IndexedDataset(prefix)
    assert dataset.num_tokens == NUM_BYTES // dataset.dtype.itemsize
    assert dataset.document_offsets[-1] == dataset.num_tokens
    for place, token in marks.items():
        number = int(np.searchsorted(dataset.document_offsets, place, side="right")) - 1
        first = int(dataset.document_offsets[number])
        assert dataset.document(number)[place - first] == token
        assert dataset.tokens[place] == token


@pytest.mark.fault("data-limits")
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["stream", "document"])
def test_rows_of_a_file_beyond_32_bits(sparse: tuple[Path, dict[int, int]], mode: str) -> None:
    """Every marked token stands in the row that begins before it, at its distance."""
    prefix, marks = sparse
    dataset = IndexedDataset(prefix)
    index = RowIndex(mode, dataset.document_offsets, SEQ_LENGTH)  # type: ignore[arg-type]
    found: dict[int, int] = {}
    for place in marks:
        row = last_row_at(index, place)
        rows = np.arange(max(0, row - 1), min(row + 2, index.num_rows), dtype=np.int64)
        ids, segment = (np.empty((len(rows), SEQ_LENGTH), np.int64) for _ in range(2))
        index.fill(dataset.tokens, rows, IDS, out_ids=ids, out_segment=segment)
        for row_ids, first in zip(ids, index.first_tokens(rows).tolist(), strict=True):
            # Without its separators, which only stream mode has inside, a row holds consecutive tokens.
            body = row_ids[1:-1][row_ids[1:-1] != IDS.sep]
            found |= {first + column: int(token) for column, token in enumerate(body) if token >= 100}
    left_out = [place for place in marks if place >= dataset.num_tokens - index.num_left_out]
    assert found == {place: token for place, token in marks.items() if place not in left_out}
    assert len(left_out) <= 3 if mode == "stream" else not left_out


def last_row_at(index: RowIndex, place: int) -> int:
    """The last row that begins at or before token `place`, found by halving."""
    low, high = 0, index.num_rows
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if index.first_tokens(np.array([middle]))[0] <= place else (low, middle)
    return low


@pytest.mark.fault("data-limits")
@pytest.mark.slow
@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer reserves terabytes itself")
def test_a_file_beyond_32_bits_is_read_in_little_memory(tmp_path: Path) -> None:
    """Opening, indexing and a thousand random rows; the process may not reserve the file's size twice."""
    write_sparse(tmp_path / "big", "uint16")
    program = f"""
import numpy as np
from pathlib import Path
from pretrain.data.dataset.indexed_dataset import IndexedDataset
from pretrain.data.sample_index import RowIds, RowIndex
dataset = IndexedDataset({str(tmp_path / "big")!r})
index = RowIndex("stream", dataset.document_offsets, {SEQ_LENGTH})
rows = np.random.default_rng(1).integers(0, index.num_rows, 1000)
ids, segment = np.empty((1000, {SEQ_LENGTH}), np.int64), np.empty((1000, {SEQ_LENGTH}), np.int64)
index.fill(dataset.tokens, rows, RowIds({IDS.vocab_size}, 2, 3, 1), out_ids=ids, out_segment=segment)
status = Path("/proc/self/status").read_text()  # not getrusage: its maximum goes on from the parent's
print(int(status.partition("VmHWM:")[2].split()[0]) * 1024)
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, check=True, capture_output=True, text=True, preexec_fn=limit_address_space)
    assert int(result.stdout) < PEAK_BYTES


def limit_address_space() -> None:
    limit = NUM_BYTES + (3 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


@pytest.mark.fault("data-limits")
@pytest.mark.slow
def test_more_than_2_to_the_31_documents() -> None:
    """All but the last few are empty. Offsets that are only zeros cost no memory: they are one page, mapped often."""
    num_documents = 2**31 + 10
    try:
        offsets = np.zeros(num_documents + 1, np.int64)
    except MemoryError:
        pytest.skip(f"no address space of {8 * num_documents} bytes here")
    offsets[-4:] = [3, 10, 10, 23]
    tokens = np.arange(100, 123, dtype=np.uint16)
    for mode in ("stream", "document"):
        index = RowIndex(mode, offsets, 6)  # type: ignore[arg-type]
        ids, segment = (np.empty((index.num_rows, 6), np.int64) for _ in range(2))
        index.fill(tokens, np.arange(index.num_rows), IDS, out_ids=ids, out_segment=segment)
        assert ids[ids >= 100].tolist() == tokens.tolist()[: 23 if mode == "document" else 22]
        assert index.memory_bytes < 10_000


@pytest.mark.slow
def test_an_order_of_a_million_million_samples_repeats_nothing() -> None:
    """10^6 positions go to 10^6 samples, which the inverse of the plain version leads back."""
    size = 10**12
    generator = np.random.default_rng(3)
    positions = np.unique(np.concatenate([generator.integers(0, size, 900_000), np.arange(100_000) + size - 100_000]))
    samples = permute(11, 2, positions, size)
    assert samples.min() >= 0
    assert samples.max() < size
    assert np.unique(samples).size == positions.size
    # As even as chance allows: a thousand bins of about a thousand, five standard deviations wide.
    counts = np.bincount(samples // 10**9, minlength=1000)
    assert abs(counts - positions.size / 1000).max() < 5 * (positions.size / 1000) ** 0.5 + 1
    plain = Permutation(11, 2, size)
    for position, sample in zip(positions[::1000].tolist(), samples[::1000].tolist(), strict=True):
        assert plain.inverse(sample) == position
