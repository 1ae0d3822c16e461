"""MMIDIDX both ways: megatron-core reads ours, we read megatron-core's, and the bytes are the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dataset_builders import write_dataset

from pretrain.data.dataset.indexed_dataset import IndexedDataset
from pretrain.data.dataset.verification import verify
from pretrain.data.tokenizer.base import best_dtype

pytestmark = pytest.mark.slow  # importing megatron-core takes about ten seconds

DOCUMENTS = [[[5, 6, 7], [8]], [[9, 10]], [[11], [12, 13, 14, 15]], [[]], []]


def write_with_megatron(prefix: Path, documents: list, dtype: str) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.dtype(dtype).type)
    for document in documents:
        tokens = [token for sequence in document for token in sequence]
        builder.add_document(torch.tensor(tokens, dtype=torch.int64), [len(sequence) for sequence in document])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "uint16"])
def test_both_write_the_same_bytes_and_read_the_same_documents(tmp_path: Path, dtype: str) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset

    write_with_megatron(tmp_path / "theirs", DOCUMENTS, dtype)
    write_dataset(tmp_path / "ours", DOCUMENTS, dtype)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    theirs, ours = MegatronDataset(str(tmp_path / "ours")), IndexedDataset(tmp_path / "theirs")
    assert ours.manifest is None
    assert np.array_equal(theirs.document_indices, ours.document_indices)
    assert np.array_equal(theirs.sequence_lengths, ours.sequence_lengths)
    offsets = np.append(ours.sequence_pointers // ours.dtype.itemsize, ours.num_tokens)
    for i in range(ours.num_sequences):
        assert np.array_equal(theirs[i], ours.tokens[offsets[i] : offsets[i + 1]])
    assert len(verify(tmp_path / "theirs")) == 1  # only that there is no manifest


def test_the_dtype_rule_is_megatrons() -> None:
    from megatron.core.datasets.indexed_dataset import DType

    for size in (10, 65_499, 65_500, 65_536, 10**6):
        assert best_dtype(size) == np.dtype(DType.optimal_dtype(size))
