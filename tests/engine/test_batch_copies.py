"""Micro-batches on their way to the device: one block, one copy, the same values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_builders import write_lengths

from pretrain.data.batches import Batch, BatchSource, RowSource
from pretrain.engine.batch_copies import BatchCopies, copy_together
from pretrain.model.token_rows import full_rows, plan_rows


def fields(batch: Batch) -> tuple[np.ndarray, ...]:
    return batch.input_ids_BL, batch.segment_BL, batch.valid_BL, batch.masked_index_M, batch.masked_label_M


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    write_lengths(tmp_path / "a", [400, 7, 30])
    rows = RowSource([tmp_path / "a"], "stream", 64)
    source = BatchSource(
        rows,
        micro_batch_size=3,
        seed=1,
        mask_rate=0.15,
        masking="token",
        mean_span_length=3.0,
        exclude_special=False,
        shuffle=True,
    )
    return source.micro_batch(5)


def test_the_arrays_of_a_batch_are_sent_as_one_block(batch: Batch) -> None:
    sent: list[torch.Tensor] = []

    def send(block: torch.Tensor) -> torch.Tensor:
        sent.append(block)
        return block.clone()

    tensors, blocks = copy_together(fields(batch), send)
    assert len(sent) == 1
    assert len(blocks) == 1
    for tensor, array in zip(tensors, fields(batch), strict=True):
        assert tensor.dtype == torch.from_numpy(array).dtype
        assert np.array_equal(tensor.numpy(), array)
        assert tensor.data_ptr() != torch.from_numpy(array).data_ptr()


def test_arrays_of_different_blocks_are_sent_one_by_one(batch: Batch) -> None:
    last = batch.counting_rows(1)
    sent: list[torch.Tensor] = []
    tensors, _ = copy_together(fields(last), lambda block: sent.append(block) or block.clone())  # type: ignore[func-returns-value]
    assert len(sent) == 5
    assert all(np.array_equal(tensor.numpy(), array) for tensor, array in zip(tensors, fields(last), strict=True))


def test_a_part_of_a_block_that_is_not_contiguous_is_copied_right(batch: Batch) -> None:
    every_second = batch.input_ids_BL[:, ::2]
    tensors, _ = copy_together((every_second, batch.segment_BL), torch.clone)
    assert np.array_equal(tensors[0].numpy(), every_second)


@pytest.mark.parametrize("has_varying_sizes", [False, True])
@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_batch_arrives_with_the_plan_of_its_rows(batch: Batch, name: str, has_varying_sizes: bool) -> None:
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    plans: list[int] = []

    def plan(segment_BL: np.ndarray):  # type: ignore[no-untyped-def]
        plans.append(len(segment_BL))
        return plan_rows(segment_BL, separate_documents=True) if has_varying_sizes else full_rows(*segment_BL.shape)

    copies = BatchCopies(torch.device(name), plan, has_varying_sizes=has_varying_sizes)
    for _ in range(2):
        arrived = copies.finish(copies.start(batch), is_released=True)
        assert arrived.micro_batch_index == 5
        for tensor, array in zip(arrived.tensors, fields(batch), strict=True):
            assert tensor.device.type == name
            assert np.array_equal(tensor.cpu().numpy(), array)
        assert arrived.rows.num_tokens == (int((batch.segment_BL > 0).sum()) if has_varying_sizes else 3 * 64)
    assert len(plans) == (2 if has_varying_sizes else 1)
