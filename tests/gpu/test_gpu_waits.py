"""A training step on a GPU: the host waits once, for its report, and the kernels of the step are few."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from forked import run_ranks

from pretrain.bench.step_contenders import VOCAB_SIZE, Shape, config_of, random_batch

MOST_KERNELS = 1800  # of 24 layers; DeepSpeed's own step takes 7,200


def stepper(settings: tuple[str, ...]) -> Callable[[], None]:
    from pretrain.engine.plain import PlainEngine
    from pretrain.model.build import build_model
    from pretrain.parallel.launch import Launch, start_process_group
    from pretrain.parallel.mesh import Mesh

    device = torch.device("cuda", 0)
    start_process_group(Launch(0, 1, 0, 1), device)
    shape = Shape(4, 64, 24, 256, device="cuda", precision="bf16", settings=settings)
    config = config_of(shape, is_contrastive=True)
    mesh = Mesh(dp_rank=0, dp_size=1)
    engine = PlainEngine(config, build_model(config, VOCAB_SIZE, mesh, device), device, mesh)
    batches = iter([random_batch(config, number, VOCAB_SIZE) for number in range(8)])
    return lambda: None if engine.train_step([next(batches)], learning_rate=1e-4) else None


def wait_for_nothing_else(settings: tuple[str, ...]) -> None:
    run_step = stepper(settings)
    for _ in range(4):  # allocates, tunes and compiles
        run_step()
    torch.cuda.set_sync_debug_mode("error")  # every wait but that for an event, which `PendingReport.read` uses
    try:
        run_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def count_kernels(settings: tuple[str, ...]) -> int:
    from torch.profiler import ProfilerActivity, profile

    run_step = stepper(settings)
    for _ in range(4):
        run_step()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        run_step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in found.events())


@pytest.mark.parametrize("settings", [("zero.stage=1",), ("zero.stage=2",), ("optim.name=lamb",)])
def test_the_host_waits_once_in_a_step(settings: tuple[str, ...]) -> None:
    run_ranks(1, wait_for_nothing_else, settings)


def test_a_step_takes_few_kernels() -> None:
    assert run_ranks(1, count_kernels, ("zero.stage=1",))[0] <= MOST_KERNELS
