"""What a training step costs the host beside the model: operations, waits and time of one rank of a world of any size.

The other ranks are pretended: with torch's fake process group every collective returns at once, with nothing in it. So
one process on one machine shows what the bookkeeping of a large run costs each of its hosts; its losses mean nothing.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as distributed
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.bench.contest import versions
from pretrain.bench.step_contenders import Shape, config_of, random_batch

if TYPE_CHECKING:
    from pretrain.config.sections import RunConfig
    from pretrain.engine.plain import PlainEngine

VOCAB_SIZE = 2000
# Views are bookkeeping of the host too, but no kernels.
_VIEWS = frozenset({"view", "detach", "slice", "t", "transpose", "expand", "as_strided", "select", "unbind", "split"})
_READS = frozenset({"_local_scalar_dense"})


@dataclass(frozen=True)
class HostCost:
    """One optimizer step of one rank.

    Attributes:
        operations: dispatched by each stage of the step (names of `Heartbeat.stage`), without views.
        outside: those that the model's own forward and backward do not make.
        reads: values that the host asked a device for.
        milliseconds: of a step, median, on the wall clock.
    """

    num_parameters: int
    operations: dict[str, int]
    outside: int
    reads: int
    milliseconds: float

    def as_dict(self) -> dict[str, Any]:
        """The same in JSON types."""
        return {**vars(self), "versions": versions("torch", "deepspeed")}


def measure_host(shape: Shape, world_size: int, *, steps: int, num_micro_batches: int = 1) -> HostCost:
    """The cost of rank 0 of `world_size` pretended data-parallel ranks; in a process without any other process group.

    Layers of few features and rows of few tokens leave the host's own work visible.
    """
    from pretrain.engine.plain import PlainEngine
    from pretrain.model.build import build_model
    from pretrain.parallel.mesh import start_mesh

    _pretend(world_size)
    batch_size = shape.rows * world_size * num_micro_batches
    settings = (f"train.global_batch_size={batch_size}", "train.replica_check_every=null", *shape.settings)
    config = config_of(Shape(**{**vars(shape), "settings": settings}), is_contrastive=True, world_size=world_size)
    device, mesh = torch.device("cpu"), start_mesh(config.parallel, torch.device("cpu"))
    engine = PlainEngine(config, build_model(config, VOCAB_SIZE, mesh, device), device, mesh)
    run_step = _stepper(engine, config, num_micro_batches)
    for _ in range(2):
        run_step()
    counted = Dispatched(lambda: engine.heartbeat.stage)
    with counted:
        run_step()
    seconds = [_seconds(run_step) for _ in range(steps)]
    return HostCost(
        sum(1 for _ in engine.engine.module.parameters()),
        dict(counted.per_stage),
        sum(counted.per_stage.values()) - num_micro_batches * count_model(config),
        counted.reads,
        1000 * median(seconds),
    )


def count_model(config: RunConfig) -> int:
    """Operations of forward and backward of one micro-batch of the bare model, without any engine."""
    from pretrain.model.build import build_model
    from pretrain.model.pretraining import PretrainingLosses
    from pretrain.parallel.mesh import Mesh

    model = build_model(config, VOCAB_SIZE, Mesh(dp_rank=0, dp_size=1), torch.device("cpu")).train()
    if config.precision != "fp32":
        model.to(torch.bfloat16)
    batch = random_batch(config, 0, VOCAB_SIZE)
    arrays = (batch.input_ids_BL, batch.segment_BL, batch.valid_BL, batch.masked_index_M, batch.masked_label_M)
    counted = Dispatched(lambda: "model")
    with counted:
        rows = model.plan_rows(batch.segment_BL)
        losses = PretrainingLosses(*model(*map(torch.from_numpy, arrays), batch.micro_batch_index, rows))
        losses.total.backward()  # type: ignore[no-untyped-call]
    return counted.per_stage["model"]


class Dispatched(TorchDispatchMode):
    """Counts what torch dispatches inside this context, by what `stage` says at that moment."""

    def __init__(self, stage: Callable[[], str]) -> None:
        super().__init__()
        self._stage = stage
        self.per_stage: Counter[str] = Counter()
        self.names: Counter[str] = Counter()
        self.reads = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.overloadpacket.__name__
        if name in _READS:
            self.reads += 1
        elif name not in _VIEWS:
            self.per_stage[self._stage()] += 1
            self.names[name] += 1
        return operation(*args, **(kwargs or {}))


def _pretend(world_size: int) -> None:
    """A process group of `world_size` ranks, of which this process is the first and the only one."""
    if distributed.is_initialized():
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from pretrain.parallel.launch import Launch, start_process_group

    local = min(world_size, 8)
    os.environ.update(RANK="0", WORLD_SIZE=str(world_size), LOCAL_RANK="0", LOCAL_WORLD_SIZE=str(local))
    distributed.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    start_process_group(Launch(0, world_size, 0, local), torch.device("cpu"))


def _stepper(engine: PlainEngine, config: RunConfig, num_micro_batches: int) -> Callable[[], None]:
    batches = [random_batch(config, number, VOCAB_SIZE) for number in range(num_micro_batches)]

    def run_step() -> None:
        engine.train_step(batches, learning_rate=1e-4)

    return run_step


def _seconds(run_step: Callable[[], None]) -> float:
    start = time.perf_counter()
    run_step()
    return time.perf_counter() - start
