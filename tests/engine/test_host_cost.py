"""What a step dispatches outside the model's own forward and backward: a number that does not grow with the model."""

from __future__ import annotations

import pytest
from forked import run_ranks

from pretrain.bench.host_cost import HostCost, measure_host
from pretrain.bench.step_contenders import Shape

LAYERS = (2, 8)
PARAMETERS_PER_LAYER = 12


def costs(stage: int, world_size: int, settings: tuple[str, ...], num_micro_batches: int) -> list[HostCost]:
    shape = Shape(
        rows=2, seq_length=16, hidden_size=64, num_negatives=2, dropout=0.0, settings=(f"zero.stage={stage}", *settings)
    )
    return [
        measure_host(
            Shape(**{**vars(shape), "num_layers": num_layers}), world_size, steps=1, num_micro_batches=num_micro_batches
        )
        for num_layers in LAYERS
    ]


# The most operations of a step, and how many more a layer may cost. ZeRO-1 and 2 wait for whole buckets of gradients;
# autograd adds a second micro-batch to the gradients of the first parameter by parameter. Without ZeRO, and under
# ZeRO-3, DeepSpeed works parameter by parameter, but asks none of them any more.
@pytest.mark.parametrize(
    ("stage", "world_size", "settings", "num_micro_batches", "most", "per_layer"),
    [
        (1, 1, (), 1, 100, 2),
        (1, 8, (), 1, 120, 2),
        pytest.param(1, 8, ("zero.reduce_bucket_size=100000",), 2, 400, 40, marks=pytest.mark.slow),
        pytest.param(2, 8, (), 1, 120, 2, marks=pytest.mark.slow),
        pytest.param(2, 1, (), 2, 200, PARAMETERS_PER_LAYER, marks=pytest.mark.slow),
        pytest.param(0, 1, (), 1, 450, 5 * PARAMETERS_PER_LAYER, marks=pytest.mark.slow),
        pytest.param(3, 8, (), 1, 1000, 9 * PARAMETERS_PER_LAYER, marks=pytest.mark.slow),
    ],
)
def test_the_host_dispatches_few_operations_beside_the_model(
    stage: int, world_size: int, settings: tuple[str, ...], num_micro_batches: int, most: int, per_layer: int
) -> None:
    small, large = run_ranks(1, costs, stage, world_size, settings, num_micro_batches)[0]
    assert large.outside <= most
    assert large.outside - small.outside <= per_layer * (LAYERS[1] - LAYERS[0])
    # Not one per parameter: the report of the step, and what the C++ optimizer is told of each of two groups (step,
    # scale, skip), which is free on a CPU. On a GPU it is one per step (tests/gpu/test_gpu_waits.py).
    assert large.reads == small.reads <= 7
