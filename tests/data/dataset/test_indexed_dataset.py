"""Datasets on disk: written and read alike, every damage found at opening, nothing half-written left behind."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from dataset_builders import tokenizer_info, write_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pretrain.data.dataset.indexed_dataset as module
from pretrain.data.dataset.dataset_writer import IndexedDatasetWriter
from pretrain.data.dataset.indexed_dataset import IndexedDataset
from pretrain.data.dataset.verification import verify
from pretrain.data.tokenizer.base import best_dtype
from pretrain.errors import DataError

DOCUMENTS = [[[5, 6, 7], [8]], [], [[]], [[9, 10]], [[11], [], [12]]]
IN_TMP = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
corpora = st.lists(st.lists(st.lists(st.integers(0, 99), max_size=6), max_size=4), max_size=8)


def flat(documents: list) -> list[int]:
    return [token for document in documents for sequence in document for token in sequence]


@IN_TMP
@given(documents=corpora, dtype=st.sampled_from(["uint8", "int8", "int16", "int32", "int64", "uint16"]))
def test_what_is_written_is_read(tmp_path: Path, documents: list, dtype: str) -> None:
    manifest = write_dataset(tmp_path / "a.v1", documents, dtype, overwrite=True)
    dataset = IndexedDataset(tmp_path / "a.v1")
    assert dataset.manifest == manifest
    assert dataset.dtype == np.dtype(dtype)
    assert len(dataset) == dataset.num_documents == manifest.documents == len(documents)
    assert dataset.sequence_lengths.tolist() == [len(s) for d in documents for s in d]
    assert dataset.document_indices.tolist() == np.cumsum([0, *(len(d) for d in documents)]).tolist()
    assert dataset.tokens.tolist() == flat(documents)
    assert dataset.document_offsets.tolist() == np.cumsum([0, *(len(flat([d])) for d in documents)]).tolist()
    assert [dataset.document(i).tolist() for i in range(len(dataset))] == [flat([d]) for d in documents]
    assert verify(tmp_path / "a.v1") == []


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_small_chunks_check_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    write_dataset(tmp_path / "a", DOCUMENTS)
    monkeypatch.setattr(module, "_CHUNK", chunk)
    dataset = IndexedDataset(tmp_path / "a")
    assert [dataset.document(i).tolist() for i in range(5)] == [flat([d]) for d in DOCUMENTS]


def test_a_document_outside_the_dataset_is_an_index_error(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", DOCUMENTS)
    for index in (-1, 5):
        with pytest.raises(IndexError):
            IndexedDataset(tmp_path / "a").document(index)


def test_dtype_follows_the_vocabulary() -> None:
    assert [best_dtype(size).name for size in (1, 65_499, 65_500, 250_000)] == ["uint16", "uint16", "int32", "int32"]


def test_importing_the_reader_needs_no_torch() -> None:
    program = "import sys, pretrain.data.dataset.indexed_dataset; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """A dataset as Megatron leaves it: without a manifest, so the two files must speak for themselves."""
    write_dataset(tmp_path / "a", DOCUMENTS)
    (tmp_path / "a.json").unlink()
    return tmp_path / "a"


def patch(prefix: Path, suffix: str, offset: int, data: bytes) -> None:
    path = prefix.with_name(prefix.name + suffix)
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(bytes(content))


def number(value: int, width: int = 8) -> bytes:
    return value.to_bytes(width, "little", signed=value < 0)


NUM_SEQUENCES = 7
POINTERS = 34 + 4 * NUM_SEQUENCES
DOCUMENT_INDICES = POINTERS + 8 * NUM_SEQUENCES


@pytest.mark.fault("data-index")
@pytest.mark.parametrize(
    ("offset", "data", "named"),
    [
        (0, b"X", "magic"),
        (9, number(2), "version: expected 1, found 2"),
        (17, b"\x06", "dtype code"),
        (17, b"\x07", "dtype code"),
        (17, b"\x00", "dtype code"),
        (17, b"\xff", "dtype code"),
        (17, b"\x04", "sequence pointer 1: expected 12, found 6"),
        (18, number(2**60), "size: expected"),
        (18, number(2**64 - 1), "size: expected"),
        (26, number(2**63), "size: expected"),
        (26, number(0), "size: expected"),
        (34, number(-1, 4), "sequence length 0: expected at least 0, found -1"),
        (34, number(2, 4), "sequence pointer 1: expected 4, found 6"),
        (POINTERS, number(2), "sequence pointer 0: expected 0, found 2"),
        (POINTERS + 8, number(-6), "sequence pointer 1"),
        (DOCUMENT_INDICES, number(1), "document index 0: expected 0, found 1"),
        (DOCUMENT_INDICES + 8, number(3), "document index 2: expected at least 3, found 2"),
        (DOCUMENT_INDICES + 8, number(-1), "document index 1: expected at least 0, found -1"),
        (DOCUMENT_INDICES + 40, number(8), "last document index: expected the sequence count 7, found 8"),
        (DOCUMENT_INDICES + 40, number(6), "last document index: expected the sequence count 7, found 6"),
    ],
)
def test_a_damaged_index_names_file_field_expected_and_found(
    prefix: Path, offset: int, data: bytes, named: str
) -> None:
    patch(prefix, ".idx", offset, data)
    with pytest.raises(DataError) as error:
        IndexedDataset(prefix)
    assert named in str(error.value)
    assert str(prefix) + ".idx" in str(error.value)
    assert verify(prefix) == [str(error.value)]


@pytest.mark.fault("data-size")
@pytest.mark.parametrize(("size", "found"), [(0, 0), (15, 15), (17, 17), (1000, 1000)])
def test_a_bin_of_another_size_is_told_in_bytes(prefix: Path, size: int, found: int) -> None:
    with open(f"{prefix}.bin", "r+b") as file:
        file.truncate(size)
    with pytest.raises(DataError, match=rf"a.bin: expected 16( or more)? bytes, found {found}"):
        IndexedDataset(prefix)


@pytest.mark.fault("data-index")
@pytest.mark.parametrize("size", [0, 8, 33, 34, 100, 165, 167])
def test_an_index_of_another_size_is_refused(prefix: Path, size: int) -> None:
    with open(f"{prefix}.idx", "r+b") as file:
        file.truncate(size)
    with pytest.raises(DataError, match="a.idx: size: expected"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_named(prefix: Path, suffix: str) -> None:
    Path(f"{prefix}{suffix}").unlink()
    with pytest.raises(DataError, match=f"a{suffix}: No such file"):
        IndexedDataset(prefix)
    Path(f"{prefix}{suffix}").mkdir()
    with pytest.raises(DataError, match=f"a{suffix}: is not a file"):
        IndexedDataset(prefix)


@pytest.mark.slow
@settings(IN_TMP, max_examples=400)
@given(data=st.data())
def test_patched_headers_give_an_error_or_an_equal_dataset(prefix: Path, data: st.DataObject) -> None:
    write_dataset(prefix, DOCUMENTS, overwrite=True)
    Path(f"{prefix}.json").unlink()
    size = Path(f"{prefix}.idx").stat().st_size
    offset = data.draw(st.one_of(st.integers(0, 33), st.integers(34, size - 1)), label="offset")
    value = data.draw(
        st.one_of(
            st.binary(min_size=1, max_size=8),
            st.sampled_from([2**60, 2**63, 2**64 - 1, 2**31, 2**32, 0, 1, 8]).map(number),
        ),
        label="bytes",
    )
    patch(prefix, ".idx", offset, value[: size - offset])
    try:
        dataset = IndexedDataset(prefix)
    except DataError:
        return
    assert dataset.dtype.itemsize == 2  # 3 int16 and 8 uint16 hold the same small ids
    assert dataset.tokens.tolist() == flat(DOCUMENTS)
    assert np.array_equal(dataset.sequence_lengths, [3, 1, 0, 2, 1, 0, 1])
    assert np.array_equal(np.diff(dataset.document_indices) >= 0, [True] * 5)


@pytest.mark.fault("data-index")
def test_checks_hold_without_assertions(prefix: Path) -> None:
    patch(prefix, ".idx", 0, b"X")
    program = f"from pretrain.data.dataset.verification import verify; print(verify({str(prefix)!r})[0])"
    result = subprocess.run([sys.executable, "-O", "-c", program], check=True, capture_output=True, text=True)
    assert "magic: expected" in result.stdout


@pytest.mark.fault("data-index")
def test_hostile_counts_allocate_nothing(prefix: Path) -> None:
    patch(prefix, ".idx", 18, number(2**60))
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            IndexedDataset(prefix)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_manifest_of_another_dataset_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", DOCUMENTS)
    write_dataset(tmp_path / "b", DOCUMENTS[:3])
    (tmp_path / "b.json").replace(tmp_path / "a.json")
    with pytest.raises(DataError, match="documents: the manifest says 3, the dataset has 5"):
        IndexedDataset(tmp_path / "a")


@pytest.mark.fault("data-size")
def test_verify_finds_every_flipped_bit_of_the_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.data.dataset.dataset_writer.CHUNK_BYTES", 8)
    with IndexedDatasetWriter(tmp_path / "a", "uint16") as writer:
        writer.add_document([np.arange(8)])
        manifest = writer.finalize(tokenizer=tokenizer_info())
    assert len(manifest.bin_xxh64) == 2
    good = (tmp_path / "a.bin").read_bytes()
    for bit in range(len(good) * 8):
        patch(tmp_path / "a", ".bin", bit // 8, bytes([good[bit // 8] ^ (1 << bit % 8)]))
        problems = verify(tmp_path / "a")
        chunk = bit // 64
        assert len(problems) == 1
        assert f"a.bin: chunk {chunk}, bytes {8 * chunk} to {8 * chunk + 8}: expected xxh64" in problems[0]
        (tmp_path / "a.bin").write_bytes(good)
    assert verify(tmp_path / "a") == []


def test_sums_stop_before_they_can_overflow(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 1)
    patch(prefix, ".idx", 34, number(2**31 - 1, 4))
    with pytest.raises(DataError, match=r"a\.bin: expected 4294967294 or more bytes, found 16"):
        IndexedDataset(prefix)


# -- writing -----------------------------------------------------------------------------------------------------------


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    def write_and_stop() -> None:
        with IndexedDatasetWriter(tmp_path / "a", "uint16") as writer:
            writer.add_document([np.arange(5)])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_stop()
    assert left_behind(tmp_path) == []


def test_a_block_without_finalize_leaves_nothing(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "a", "uint16") as writer:
        writer.add_document([np.arange(5)])
    assert left_behind(tmp_path) == []


def test_an_existing_dataset_is_not_overwritten_unasked(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", DOCUMENTS)
    with pytest.raises(DataError, match="a.json: exists already"):
        IndexedDatasetWriter(tmp_path / "a", "uint16")
    write_dataset(tmp_path / "a", DOCUMENTS[:1], overwrite=True)
    assert len(IndexedDataset(tmp_path / "a")) == 1
    assert left_behind(tmp_path) == ["a.bin", "a.idx", "a.json"]


def test_a_failed_overwrite_keeps_the_old_dataset(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", DOCUMENTS)
    with pytest.raises(DataError), IndexedDatasetWriter(tmp_path / "a", "uint16", overwrite=True) as writer:
        writer.add_document([np.array([70_000])])
    assert len(IndexedDataset(tmp_path / "a")) == 5
    assert verify(tmp_path / "a") == []


@pytest.mark.fault("preprocess")
def test_a_crash_while_publishing_leaves_nothing_that_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path / "a", DOCUMENTS)
    real_replace, calls = Path.replace, []

    def replace_once(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) > 1:
            raise OSError(5, "Input/output error")
        return real_replace(self, target)

    monkeypatch.setattr(Path, "replace", replace_once)
    with pytest.raises(DataError, match="Input/output error"):
        write_dataset(tmp_path / "a", DOCUMENTS[:1], overwrite=True)
    assert left_behind(tmp_path) == ["a.bin"]
    with pytest.raises(DataError, match="No such file"):
        IndexedDataset(tmp_path / "a")


@pytest.mark.parametrize(
    ("tokens", "dtype", "named"),
    [
        ([65_536], "uint16", "token id 65536 does not fit into uint16"),
        ([-1], "int32", "token id -1 does not fit"),
        ([128], "int8", "token id 128 does not fit into int8"),
        ([1.5], "uint16", "integer array"),
        ([[1, 2]], "uint16", "one-dimensional"),
    ],
)
def test_ids_that_do_not_fit_are_refused(tmp_path: Path, tokens: list, dtype: str, named: str) -> None:
    with pytest.raises(DataError, match=named), IndexedDatasetWriter(tmp_path / "a", dtype) as writer:
        writer.add_document([np.array(tokens)])
    assert left_behind(tmp_path) == []


def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="token id 100 is not in the vocabulary"):
        write_dataset(tmp_path / "a", [[[100]]], vocab_size=100)
    assert left_behind(tmp_path) == []


def test_float_datasets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="dtype float32 cannot hold token ids"):
        IndexedDatasetWriter(tmp_path / "a", "float32")


def test_a_missing_folder_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no/a\.bin\.tmp: cannot be written"):
        write_dataset(tmp_path / "no" / "a", DOCUMENTS)


@pytest.mark.fault("preprocess")
def test_a_full_disk_leaves_nothing_and_says_so(tmp_path: Path) -> None:
    program = f"""
import resource, signal, numpy
from pretrain.data.dataset.dataset_writer import IndexedDatasetWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
with IndexedDatasetWriter({str(tmp_path / "a")!r}, "uint16") as writer:
    for _ in range(100):
        writer.add_document([numpy.arange(1000)])
"""
    result = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert "DataError" in result.stderr
    assert "cannot be written: File too large" in result.stderr
    assert left_behind(tmp_path) == []


def test_memory_does_not_grow_with_the_dataset(tmp_path: Path) -> None:
    document = [np.arange(3, dtype=np.uint16)] * 10
    tracemalloc.start()
    try:
        with IndexedDatasetWriter(tmp_path / "a", "uint16") as writer:
            for _ in range(2_000):
                writer.add_document(document)
            assert tracemalloc.get_traced_memory()[1] < 1_500_000
            writer.finalize(tokenizer=tokenizer_info())
    finally:
        tracemalloc.stop()
    assert IndexedDataset(tmp_path / "a").num_sequences == 20_000
