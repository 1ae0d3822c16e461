"""What the trainer knows of DeepSpeed: configuration in, four verbs out.

The trainer sees `train_step`, `evaluate`, `capture_state` and `load_state`; whether ZeRO splits optimizer state,
gradients or parameters is decided here and nowhere else.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed

from pretrain.checkpoint.captured_state import CapturedState, HostMemory, find_non_finite
from pretrain.checkpoint.state_files import Range, StateReader, read_counters
from pretrain.config.deepspeed import build_ds_config, zero_stage
from pretrain.config.sections import RunConfig
from pretrain.data.batches import Batch
from pretrain.durable import FileRecord
from pretrain.engine.device_clock import DeviceClock
from pretrain.engine.zero_state import describe_parameters, read_loss_scale, set_loss_scale, zero_state
from pretrain.errors import CheckpointError, TacoError
from pretrain.model.pretraining import PretrainingLosses
from pretrain.optim import build_optimizer, parameter_groups
from pretrain.parallel import collectives
from pretrain.parallel.mesh import Mesh
from pretrain.resilience.heartbeat import Heartbeat
from pretrain.resilience.replicas import Drift, ReplicaCheck

# Given the losses that this rank knows, whether the weights must stay as they are.
Veto = Callable[[Sequence[PretrainingLosses]], bool]
# The losses that this rank knows, and the gradient norm where DeepSpeed keeps none.
StepOutcome = tuple[list[PretrainingLosses], float | None]


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank: losses are means over all micro-batches of all ranks.

    `is_skipped`: no weight has changed, because a gradient was not finite or the loss not wanted. `bad_micro_batches`:
    global numbers of this rank's own micro-batches whose loss was not finite; the one field that differs between ranks.
    `requests[i]` is True where any rank's i-th request was: what one rank wants, all hear of at the same step.
    `work_seconds` is what each rank gave for itself, in rank order.
    """

    loss: float
    mlm_loss: float
    contrastive_loss: float
    grad_norm: float
    is_skipped: bool
    requests: tuple[bool, ...]
    bad_micro_batches: tuple[int, ...] = ()
    work_seconds: tuple[float, ...] = ()


@dataclass(frozen=True)
class EvalResult:
    """Means over the evaluated micro-batches and the `num_labels` masked tokens of all ranks.

    `baseline_accuracy` is that of the most frequent label, given everywhere.
    """

    mlm_loss: float
    contrastive_loss: float
    accuracy: float
    baseline_accuracy: float
    num_labels: int


class Engine(ABC):
    """DeepSpeed behind four verbs; a subclass says how micro-batches go through the model."""

    def __init__(
        self,
        config: RunConfig,
        model: torch.nn.Module,
        device: torch.device,
        mesh: Mesh,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        import deepspeed

        self.config = config
        self.heartbeat = heartbeat or Heartbeat()
        self.device = device
        self.mesh = mesh
        shapes = describe_parameters(model)
        is_sharded = zero_stage(config) > 0 and mesh.dp_size > 1
        shard_group = (mesh.data_group or distributed.group.WORLD) if is_sharded else None
        if config.optim.implementation == "deepspeed":
            optimizer = _deepspeed_adamw(model, config)
        else:
            optimizer = build_optimizer(model, config.optim, shard_group=shard_group, tensor_group=mesh.tensor_group)
        self.ds_config = build_ds_config(config, mesh.dp_size)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=self.ds_config, mpu=mesh.mpu)
        self.clock = DeviceClock(device)
        if self.clock.is_used:  # the host only queues what a GPU does
            self.heartbeat.work_stages = frozenset({"data"})
        self.state = zero_state(self.engine, zero_stage(config), mesh, shapes)
        self._replicas = ReplicaCheck(self.engine.module, mesh, device)
        self._host_memory = HostMemory(is_page_locked=device.type == "cuda")

    @abstractmethod
    def _run_step(self, micro_batches: Sequence[Batch], is_vetoed: Veto) -> StepOutcome:
        """Forward, backward and the optimizer's step; the losses that this rank knows, and the gradient norm.

        `is_vetoed` is asked once, by all ranks, when all losses are there and no weight has changed; it may be a
        collective. After a yes, weights and moments stay as they are.
        """

    @abstractmethod
    def _run_evaluation(self, micro_batches: Iterable[Batch]) -> Iterator[tuple[PretrainingLosses, Batch]]:
        """Forward without dropout; the losses that this rank knows, each with its micro-batch."""

    def train_step(
        self,
        micro_batches: Sequence[Batch],
        *,
        learning_rate: float,
        requests: Sequence[bool] = (),
        work_seconds: float | None = None,
        may_not_update: Callable[[float], bool] | None = None,
    ) -> StepResult:
        """Forward and backward over this rank's micro-batches, then one optimizer step at `learning_rate`.

        All ranks give `work_seconds`, which every one of them then learns from all, or none does. `may_not_update`
        looks at the loss of the step, the same on all ranks, and says whether to leave all weights as they are.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        told = [float(wanted) for wanted in requests] + _own_place(work_seconds)
        sums: list[float] = []
        vetoed = False

        def is_vetoed(known: Sequence[PretrainingLosses]) -> bool:
            nonlocal sums, vetoed
            if may_not_update is not None:
                sums = self._sum_over_ranks(known, len(micro_batches), told)
                vetoed = may_not_update(sums[0])
            return vetoed

        known, grad_norm = self._run_step(micro_batches, is_vetoed)
        loss, mlm_loss, contrastive_loss, *rest = sums or self._sum_over_ranks(known, len(micro_batches), told)
        self.heartbeat.add_work(self.clock.take())
        counts, work = rest[: len(requests)], rest[len(requests) :]
        if grad_norm is None:
            found = self.engine.get_global_grad_norm()
            # A first step that overflows in fp16 is skipped before DeepSpeed has any norm.
            grad_norm = math.nan if found is None else float(found)
        # Without ZeRO DeepSpeed looks at no gradient; `_run_step` did.
        is_skipped = (
            vetoed
            or not self.engine.was_step_applied()
            or (zero_stage(self.config) == 0 and not math.isfinite(grad_norm))
        )
        wanted = tuple(count > 0 for count in counts)
        bad = () if math.isfinite(loss) else _not_finite(known, micro_batches)
        return StepResult(loss, mlm_loss, contrastive_loss, grad_norm, is_skipped, wanted, bad, tuple(work))

    def _sum_over_ranks(
        self, known: Sequence[PretrainingLosses], num_micro_batches: int, told: Sequence[float]
    ) -> list[float]:
        """The mean losses of a step, then the sums of what each rank tells: one small collective per step."""
        self.heartbeat.enter("losses")
        losses = torch.zeros(3, dtype=torch.float64, device=self.device)
        for step in known:
            losses += torch.stack([step.total, step.mlm, step.contrastive])
        # All tensor ranks of the last stage know the same losses.
        losses /= num_micro_batches * self.mesh.dp_size * self.mesh.tp_size
        sums: list[float] = collectives.sum_over_ranks(torch.cat([losses, losses.new_tensor(told)])).tolist()
        return sums

    @contextlib.contextmanager
    def _no_update(self, *, unless: bool) -> Iterator[None]:
        """Keep weights and moments as they are through an optimizer step; DeepSpeed does the rest of its work."""
        if unless:
            yield
            return
        optimizer = self.engine.basic_optimizer  # the one inside whatever ZeRO wraps around it
        update = optimizer.step
        optimizer.step = lambda *_, **__: None
        try:
            yield
        finally:
            optimizer.step = update

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[Batch]) -> EvalResult:
        """Losses and masked-token accuracy without dropout; every rank must bring the same number of micro-batches.

        A micro-batch without labels and valid tokens counts nothing: ranks with less to do fill up with those.
        """
        # Summed over micro-batches: mlm loss x labels, contrastive loss, micro-batches, correct labels, labels.
        sums = torch.zeros(5, dtype=torch.float64, device=self.device)
        label_counts = torch.zeros(self.engine.module.vocab_size, dtype=torch.int64)
        for losses, batch in self._run_evaluation(micro_batches):
            counts = batch.valid_BL.any() or (batch.masked_label_M >= 0).any()
            sums += torch.stack(
                [
                    losses.mlm.double() * losses.num_labels,
                    losses.contrastive.double() * float(counts),
                    torch.tensor(float(counts), dtype=torch.float64, device=self.device),
                    losses.num_correct.double(),
                    losses.num_labels.double(),
                ]
            )
            labels = batch.masked_label_M[batch.masked_label_M >= 0]
            label_counts += torch.bincount(torch.from_numpy(labels), minlength=len(label_counts))
        # All tensor ranks of the last stage count the same rows.
        sums = collectives.sum_over_ranks(sums) / self.mesh.tp_size
        mlm, contrastive, num_batches, correct, num_labels = sums.tolist()
        most_frequent = int(collectives.sum_over_ranks(label_counts.to(self.device)).max()) // self.mesh.tp_size
        return EvalResult(
            mlm_loss=mlm / max(num_labels, 1),
            contrastive_loss=contrastive / max(num_batches, 1),
            accuracy=correct / max(num_labels, 1),
            baseline_accuracy=most_frequent / max(num_labels, 1),
            num_labels=int(num_labels),
        )

    def find_drift(self) -> list[Drift]:
        """Parameters of which ranks hold copies that differ; the same list on every rank."""
        return self._replicas.find_drift()

    def reserve_copies(self) -> None:
        """Take the CPU memory that `capture_state` copies to, before training begins; collective.

        Raises:
            CheckpointError: a rank does not get it.
        """
        problem = None
        try:
            self._host_memory.reserve(self.state.ranges())
        except CheckpointError as error:
            problem = str(error)
        failure = collectives.first_failure(problem)
        if failure is not None:
            raise CheckpointError(failure)

    def capture_state(self, *, copies: bool) -> CapturedState:
        """This rank's share of weights and optimizer state as it is now; no rank waits for another here.

        Args:
            copies: into memory of the CPU that training never touches, and that the next capture takes again; else
                the state itself, good for writing until the next step.
        """
        self._wait_for_device()
        ranges = self.state.ranges()
        values: Callable[[Range], torch.Tensor] = self.state.values
        problem = find_non_finite(ranges, values)
        if copies:
            values = self._host_memory.copy(ranges, values)
            self._wait_for_device()
        return CapturedState(collectives.rank(), ranges, values, self.state.shapes, self._counters(), problem)

    def save_state(self, folder: Path) -> list[FileRecord]:
        """Capture and write at once; what was written, already durable.

        Raises:
            OSError: the disk refuses; no other rank waits for this one here.
        """
        return self.capture_state(copies=False).write(folder)

    def _wait_for_device(self) -> None:
        """Let what was started on a GPU, in whatever stream, come to its end."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def load_state(self, folder: Path) -> None:
        """Take weights and optimizer state from `folder`, whatever layout wrote it; collective.

        Raises:
            CheckpointError: it is damaged, or of another model.
        """
        counters: dict[str, Any] = {}
        problem = None
        try:
            counters = read_counters(folder)
            with StateReader(folder) as reader:
                self.state.read(reader, int(counters["optimizer_steps"]))
        except (CheckpointError, KeyError) as error:
            problem = str(error)
        failure = collectives.first_failure(problem)
        if failure is not None:
            raise CheckpointError(f"{folder}: cannot be continued: {failure}")
        self.state.refresh()
        set_loss_scale(self.engine, counters["loss_scale"])
        self.engine.global_steps, self.engine.skipped_steps = counters["global_steps"], counters["skipped_steps"]

    def _counters(self) -> dict[str, Any]:
        return {
            "optimizer_steps": self.state.num_steps(),
            "global_steps": self.engine.global_steps,
            "skipped_steps": self.engine.skipped_steps,
            "loss_scale": read_loss_scale(self.engine),
        }


def _own_place(value: float | None) -> list[float]:
    """One number per rank, of which this one knows its own: the sum over ranks is what each of them said."""
    if value is None:
        return []
    own = [0.0] * collectives.world_size()
    own[collectives.rank()] = value
    return own


def _not_finite(known: Sequence[PretrainingLosses], micro_batches: Sequence[Batch]) -> tuple[int, ...]:
    """Global numbers of the micro-batches whose loss this rank knows, and which is NaN or infinite."""
    pairs = zip(known, micro_batches, strict=False)  # only the last stage of a pipeline knows losses
    return tuple(batch.micro_batch_index for losses, batch in pairs if not math.isfinite(float(losses.total)))


def _deepspeed_adamw(model: torch.nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """AdamW by DeepSpeed's kernels, which it compiles at the first use on a machine (minutes, once)."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    kind = FusedAdam if config.zero.offload_optimizer.device == "none" else DeepSpeedCPUAdam
    optim = config.optim
    groups = parameter_groups(model, optim.weight_decay, one_each=False)
    try:
        optimizer: torch.optim.Optimizer = kind(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
    except (ImportError, OSError, RuntimeError, ValueError) as error:  # whatever its builder meets
        raise TacoError(
            f"optim.implementation=deepspeed: DeepSpeed cannot build {kind.__name__} here: {error}; it needs ninja, a "
            "C++ compiler, for FusedAdam nvcc and a TORCH_CUDA_ARCH_LIST of plain numbers (9.0, not 9.0a); or set "
            "optim.implementation=torch"
        ) from error
    return optimizer
