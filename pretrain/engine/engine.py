"""The trainer's view of DeepSpeed: configuration in, training steps, evaluations and states out.

The trainer sees `train_step`, `evaluate`, `capture_state` and `load_state`; whether ZeRO splits optimizer state,
gradients or parameters is decided here and nowhere else.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from pretrain.engine.answered_update import AnsweredUpdate
from pretrain.engine.device_clock import DeviceClock
from pretrain.engine.own_update import FlatUpdate, WholeUpdate
from pretrain.engine.step_report import PendingReport, Report
from pretrain.engine.token_mean import TokenMean
from pretrain.engine.update import Update
from pretrain.engine.zero_state import describe_parameters, read_loss_scale, set_loss_scale, zero_state
from pretrain.errors import CheckpointError, TacoError
from pretrain.meters.step_clock import StepClock
from pretrain.model.pretraining import PretrainingLosses
from pretrain.optim import Holdable, Lamb, build_optimizer, choose_update_kernels, parameter_groups
from pretrain.parallel import collectives
from pretrain.parallel.mesh import Mesh
from pretrain.resilience.heartbeat import Heartbeat
from pretrain.resilience.replicas import Drift, ReplicaCheck
from pretrain.step import StepResult

_NO_REQUESTS: Mapping[str, bool] = {}


@dataclass(frozen=True)
class EvalResult:
    """Figures of the evaluated rows of all ranks.

    MLM loss and accuracies are means over their `num_labels` masked tokens. The contrastive loss is the mean over
    micro-batches; one in which few rows count, the last one, weighs as much as it has of them.
    `baseline_accuracy` is the accuracy of predicting the most frequent label everywhere.
    """

    mlm_loss: float
    contrastive_loss: float
    accuracy: float
    baseline_accuracy: float
    num_labels: int


class Engine(ABC):
    """DeepSpeed behind one class; a subclass defines how micro-batches go through the model.

    Attributes:
        num_skipped: steps of the run that have changed no weight; part of every checkpoint.
        other_counts: counts that others keep here, by name, to be part of every checkpoint; those of 0 are left out.
    """

    def __init__(
        self,
        config: RunConfig,
        model: torch.nn.Module,
        device: torch.device,
        mesh: Mesh,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        import deepspeed
        from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

        self.config = config
        self.heartbeat = heartbeat or Heartbeat()
        self.device = device
        self.mesh = mesh
        shapes = describe_parameters(model)
        self.optimizer: Holdable
        optimizer: torch.optim.Optimizer
        if config.optim.implementation == "deepspeed":
            optimizer = _deepspeed_adamw(model, config)
            self.optimizer = _DeepSpeedHold(optimizer)
        else:
            optimizer = self.optimizer = build_optimizer(
                model,
                config.optim,
                norm_group=_norm_group(config, mesh),
                adds_whole=mesh.tp_rank == 0,
                kernels=choose_update_kernels(config, device),
            )
        # DeepSpeed warns of classes that it does not know; tests compare ours under ZeRO with one plain process.
        if type(optimizer) not in ZERO_SUPPORTED_OPTIMIZERS:
            ZERO_SUPPORTED_OPTIMIZERS.append(type(optimizer))
        self.ds_config = build_ds_config(config, mesh.dp_size)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=self.ds_config, mpu=mesh.mpu)
        self.step_clock = StepClock(device)
        self.step_clock.watch(deepspeed.comm.comm.cdb)
        self.heartbeat.listener = self.step_clock.enter
        self.num_skipped = 0
        self.other_counts: dict[str, int] = {}
        self.clock = DeviceClock(device)
        if self.clock.is_used:  # the host only queues what a GPU does
            self.heartbeat.work_stages = frozenset({"data"})
        self.state = zero_state(self.engine, zero_stage(config), mesh, shapes)
        if isinstance(optimizer, Lamb):
            optimizer.set_segments(*self.state.segments())
        self._update = self._build_update()
        self._replicas = ReplicaCheck(self.engine.module, mesh, device)
        self._host_memory = HostMemory(is_page_locked=device.type == "cuda")

    def _build_update(self) -> Update:
        """The update that fits what DeepSpeed has built."""
        config, stage = self.config, zero_stage(self.config)
        arguments = self.engine, self.state, self.optimizer, self.mesh, config.optim.clip_grad_norm
        if stage == 3 or config.zero.offload_optimizer.device != "none":
            return AnsweredUpdate(*arguments)
        return FlatUpdate(*arguments, self.step_clock) if stage else WholeUpdate(*arguments)

    @abstractmethod
    def _forward_backward(
        self, micro_batches: Sequence[Batch], token_mean: TokenMean | None
    ) -> list[PretrainingLosses]:
        """Gradients of all micro-batches, averaged over data-parallel ranks; returns this rank's losses.

        `token_mean`, if given, weighs the losses of each micro-batch first.
        """

    @abstractmethod
    def _step_optimizer(self) -> None:
        """Let DeepSpeed take the step of the optimizer; called while an update is `running`."""

    @abstractmethod
    def _run_evaluation(self, micro_batches: Iterable[Batch]) -> Iterator[tuple[PretrainingLosses, Batch]]:
        """Forward without dropout; yields the losses that this rank computed, each with its micro-batch."""

    def train_step(
        self,
        micro_batches: Sequence[Batch],
        *,
        learning_rate: float,
        requests: Mapping[str, bool] = _NO_REQUESTS,
        work_seconds: float | None = None,
        may_not_update: Callable[[float], bool] | None = None,
    ) -> StepResult:
        """Forward and backward over this rank's micro-batches, then one optimizer step at `learning_rate`.

        `step.StepPlan` explains the other arguments; all ranks pass the same names in `requests`.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        own_losses = self._forward_backward(micro_batches, self._start_token_mean(micro_batches))
        self.heartbeat.enter("losses")
        # All tensor ranks of the last stage compute the same losses.
        num_losses = len(micro_batches) * self.mesh.dp_size * self.mesh.tp_size
        squares = self._update.squares()
        pending = PendingReport(own_losses, num_losses, squares, requests, work_seconds, self.device)
        # All ranks decide from the same loss, before any weight has changed.
        keep_weights = may_not_update is not None and may_not_update(self._read(pending).loss)
        if not self._update.is_queued:
            self._read(pending)
        pending.start_reading()
        with self._update.running(pending, keep_weights=keep_weights):
            self._step_optimizer()
        report = self._read(pending)
        self.heartbeat.add_work(self.clock.take())
        grad_norm, is_applied = self._update.settle(report)
        is_skipped = keep_weights or not is_applied
        self.num_skipped += is_skipped
        return StepResult(
            loss=report.loss,
            mlm_loss=report.mlm_loss,
            contrastive_loss=report.contrastive_loss,
            grad_norm=grad_norm,
            is_skipped=is_skipped,
            num_skipped=self.num_skipped,
            requests=report.requests,
            bad_micro_batches=() if math.isfinite(report.loss) else _non_finite(own_losses, micro_batches),
            work_seconds=report.work_seconds,
        )

    def _read(self, pending: PendingReport) -> Report:
        """The report of the step; the first call waits for it."""
        if not pending.is_read:
            self.step_clock.reading_back()
        return pending.read()

    def _start_token_mean(self, micro_batches: Sequence[Batch]) -> TokenMean | None:
        """What weighs the MLM losses of a step; None where the mean of micro-batches is wanted, or is the same."""
        is_needed = self.config.mlm.average == "token" and len(micro_batches) * self.mesh.dp_size > 1
        return TokenMean(micro_batches, self.mesh, self.device) if is_needed else None

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[Batch]) -> EvalResult:
        """Losses and masked-token accuracy without dropout; every rank must pass the same number of micro-batches.

        Rows without labels and valid tokens do not count: ranks with fewer micro-batches add some of nothing else.
        """
        # Summed over micro-batches: mlm loss x labels, contrastive loss x rows, rows, correct labels, labels.
        sums = torch.zeros(5, dtype=torch.float64, device=self.device)
        label_counts = torch.zeros(self.engine.module.vocab_size, dtype=torch.int64)
        for losses, batch in self._run_evaluation(micro_batches):
            # A single row has no negatives, and so no contrastive loss that could count.
            num_rows = float(batch.num_rows if batch.num_rows > 1 else 0)
            sums += torch.stack(
                [
                    losses.mlm.double() * losses.num_labels,
                    losses.contrastive.double() * num_rows,
                    torch.full((), num_rows, dtype=torch.float64, device=self.device),
                    losses.num_correct.double(),
                    losses.num_labels.double(),
                ]
            )
            labels = batch.masked_label_M[batch.masked_label_M >= 0]
            label_counts += torch.bincount(torch.from_numpy(labels), minlength=len(label_counts))
        # All tensor ranks of the last stage count the same rows.
        sums = collectives.sum_over_ranks(sums) / self.mesh.tp_size
        mlm, contrastive, num_rows, correct, num_labels = sums.tolist()
        most_frequent = int(collectives.sum_over_ranks(label_counts.to(self.device)).max()) // self.mesh.tp_size
        return EvalResult(
            mlm_loss=mlm / max(num_labels, 1),
            contrastive_loss=contrastive / max(num_rows, 1),
            accuracy=correct / max(num_labels, 1),
            baseline_accuracy=most_frequent / max(num_labels, 1),
            num_labels=int(num_labels),
        )

    def find_drift(self) -> list[Drift]:
        """Parameters whose copies differ between ranks; the same list on every rank."""
        return self._replicas.find_drift()

    def reserve_copies(self) -> None:
        """Allocate the CPU memory that `capture_state` copies to, before training begins; collective.

        Raises:
            CheckpointError: a rank cannot allocate it.
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
            copies: copy into CPU memory that training never touches and the next capture uses again; otherwise return
                the state itself, valid until the next step.
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
        """Capture and write at once; returns the records of the files, which are durable by then.

        Raises:
            OSError: the disk refuses; no other rank waits for this one here.
        """
        return self.capture_state(copies=False).write(folder)

    def _wait_for_device(self) -> None:
        """Wait until a GPU has finished what was started on it, in any stream."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def load_state(self, folder: Path) -> None:
        """Load weights and optimizer state from `folder`, whatever layout wrote it; collective.

        Raises:
            CheckpointError: it is damaged, or belongs to another model.
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
        self.engine.global_steps = counters["global_steps"]
        self.num_skipped = self.engine.skipped_steps = int(counters.get("skipped_steps", 0))
        self.other_counts.clear()
        self.other_counts.update(counters.get("other_counts", {}))

    def _counters(self) -> dict[str, Any]:
        other_counts = {name: count for name, count in self.other_counts.items() if count}
        return {
            **({"other_counts": other_counts} if other_counts else {}),
            "optimizer_steps": self.state.num_steps(),
            "global_steps": self.engine.global_steps,
            "skipped_steps": self.num_skipped,
            "loss_scale": read_loss_scale(self.engine),
        }


def _non_finite(own_losses: Sequence[PretrainingLosses], micro_batches: Sequence[Batch]) -> tuple[int, ...]:
    """Global numbers of the micro-batches whose loss, computed on this rank, is non-finite."""
    pairs = zip(own_losses, micro_batches, strict=False)  # only the last stage of a pipeline computes losses
    return tuple(batch.micro_batch_index for losses, batch in pairs if not math.isfinite(float(losses.total)))


def _norm_group(config: RunConfig, mesh: Mesh) -> distributed.ProcessGroup | None:
    """The ranks that hold parts of this rank's parameters, split by ZeRO or by tensor parallelism."""
    if zero_stage(config) == 0 or mesh.dp_size == 1:
        return mesh.tensor_group
    return mesh.stage_group or mesh.data_group or distributed.group.WORLD


class _DeepSpeedHold(Holdable):
    """Holds the step of one of DeepSpeed's own optimizers.

    They cannot be subclassed as ours are: DeepSpeed compares their very type (for `offload_optimizer.ratio`). So the
    step of this one object goes through here.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._update = optimizer.step
        optimizer.step = self.step  # type: ignore[method-assign]

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """One update, unless the optimizer is held."""
        return None if self._is_held else self._update(*args, **kwargs)


def _deepspeed_adamw(model: torch.nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """AdamW with DeepSpeed's kernels, which it compiles at the first use on a machine (minutes, once)."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    adam_class = FusedAdam if config.zero.offload_optimizer.device == "none" else DeepSpeedCPUAdam
    optim = config.optim
    groups = parameter_groups(model, optim.weight_decay)
    try:
        optimizer: torch.optim.Optimizer = adam_class(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
    except (ImportError, OSError, RuntimeError, ValueError) as error:  # any failure of its builder
        raise TacoError(
            f"optim.implementation=deepspeed: DeepSpeed cannot build {adam_class.__name__} here: {error}; it needs "
            "ninja, a C++ compiler, and for FusedAdam nvcc and a TORCH_CUDA_ARCH_LIST of plain numbers (9.0, not "
            "9.0a); or set optim.implementation=torch"
        ) from error
    return optimizer
