"""Memory of micro-batches: page-locked where a GPU reads it, ordinary elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dataset_builders import write_lengths

from pretrain.data.batches import BatchSource, RowSource, ordinary_memory
from pretrain.data.pinned import memory_for, pinned_memory


def test_batches_for_the_cpu_lie_in_ordinary_memory() -> None:
    assert memory_for("cpu") is ordinary_memory
    assert memory_for("cuda") is pinned_memory
    block = ordinary_memory(24)
    assert block.shape == (24,)
    assert block.view(np.int64).shape == (3,)


@pytest.mark.gpu
def test_batches_for_a_gpu_are_page_locked_and_arrive_whole(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    write_lengths(tmp_path / "a", [4000])
    rows = RowSource([tmp_path / "a"], "stream", 64)
    options = {"micro_batch_size": 8, "seed": 1, "mask_rate": 0.15, "masking": "token", "mean_span_length": 3.0}
    source = BatchSource(rows, **options, exclude_special=False, shuffle=True, allocate=pinned_memory)  # type: ignore[arg-type]
    plain = BatchSource(rows, **options, exclude_special=False, shuffle=True)  # type: ignore[arg-type]
    for index in range(20):
        batch, expected = source.micro_batch(index), plain.micro_batch(index)
        tensor = torch.from_numpy(batch.input_ids_BL)
        assert tensor.is_pinned()
        assert torch.equal(tensor.to("cuda", non_blocking=True).cpu(), torch.from_numpy(expected.input_ids_BL))
