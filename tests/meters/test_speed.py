"""What a record says of the speed: operations per device, real tokens, MFU where the peak is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from pretrain.config.sections import RunConfig
from pretrain.data.batches import Batch
from pretrain.meters import speed as speed_module
from pretrain.meters.matmul import measure_matmul
from pretrain.meters.speed import SpeedMeter, describe_speed
from pretrain.meters.step_clock import StepClock
from pretrain.parallel.mesh import Mesh
from pretrain.planner.flops import count_rows, step_flops

CPU = torch.device("cpu")


def config_of(row_mode: str = "stream", *, tensor: int = 1) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"output_dir": "unused", "device": "cpu"},
            "data": {"train": ["unused"], "seq_length": 8, "row_mode": row_mode},
            "model": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 128},
            "train": {"micro_batch_size": 2, "global_batch_size": 4},
            "parallel": {"tensor": tensor},
        }
    )


SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 2, 3, 0, 0, 0, 0]])
BATCH = Batch(SEGMENTS, SEGMENTS, SEGMENTS > 0, np.array([1, 9]), np.array([5, 6]), 0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the time."""
    now = [0.0]
    monkeypatch.setattr(speed_module.time, "monotonic", lambda: now[0])

    def set_time(seconds: float) -> None:
        now[0] = seconds

    return set_time


@pytest.mark.parametrize(("row_mode", "tensor"), [("stream", 1), ("document", 1), ("pack", 1), ("pack", 2)])
def test_fields_of_a_record(row_mode: str, tensor: int, clock: Callable[[float], None]) -> None:
    config = config_of(row_mode, tensor=tensor)
    meter = SpeedMeter(config, 100, Mesh(dp_rank=0, dp_size=2, tp_size=tensor), CPU, StepClock(CPU))
    meter.matmul, meter.peak = 1e9, 4e9
    for _ in range(3):
        meter.count([BATCH])
    clock(2.0)
    fields = meter.take()
    assert fields["tokens_per_second"] == 3 * 4 * 8 / 2
    assert fields.get("real_tokens_per_second") == (None if row_mode == "stream" else 3 * 4 * 8 / 2 * 11 / 16)
    flops = step_flops(config, 100, count_rows(SEGMENTS, BATCH.masked_label_M, by_document=row_mode == "pack"))
    model = 3 * flops.model / 2 / tensor
    assert fields["model_tflops"] == pytest.approx(model / 1e12)
    assert (fields["mfu"], fields["mfu_of_matmul"]) == (pytest.approx(model / 4e9), pytest.approx(model / 1e9))
    assert fields["hfu"] == pytest.approx(3 * flops.hardware / 2 / tensor / 4e9)
    clock(3.0)
    assert meter.take()["tokens_per_second"] == 0


def test_words_for_people() -> None:
    assert describe_speed({"model_tflops": 231.44}) == "231.4 TFLOP/s"
    words = describe_speed({"model_tflops": 0.0123, "mfu": 0.234, "mfu_of_matmul": 0.5})
    assert words == "12.3 GFLOP/s, MFU 23.4 %, 50.0 % of its matrix products"


def test_measuring_products_draws_no_random_number_of_the_run() -> None:
    before = torch.get_rng_state()
    assert measure_matmul(config_of(tensor=2), CPU) > 1e6
    assert torch.equal(torch.get_rng_state(), before)
