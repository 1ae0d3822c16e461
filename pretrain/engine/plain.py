"""The engine without a pipeline: tensor and data parallelism with ZeRO 0-3."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as distributed

from pretrain.config.deepspeed import zero_stage
from pretrain.data.batches import Batch
from pretrain.engine.engine import Engine, StepOutcome, Veto
from pretrain.model.pretraining import PretrainingLosses
from pretrain.optim import is_tensor_parallel


class PlainEngine(Engine):
    """DeepSpeedEngine: tensor and data parallelism with ZeRO 0-3, the whole depth of the model on every rank."""

    def _run_step(self, micro_batches: Sequence[Batch], is_vetoed: Veto) -> StepOutcome:
        self.engine.train()
        known: list[PretrainingLosses] = []
        grad_norm: float | None = None
        may_update = True
        for batch in micro_batches:
            self.heartbeat.enter("forward")
            with self.clock.running():
                step = self._forward(batch)
            self.heartbeat.enter("backward")
            self.engine.backward(step.total)
            known.append(PretrainingLosses(*(value.detach() for value in step)))
            if self.engine.is_gradient_accumulation_boundary():
                self.heartbeat.enter("optimizer")
                grad_norm = self._plain_grad_norm()
                may_update = not is_vetoed(known) and (grad_norm is None or math.isfinite(grad_norm))
            with self._no_update(unless=may_update):
                self.engine.step()
        return known, grad_norm

    def _run_evaluation(self, micro_batches: Iterable[Batch]) -> Iterator[tuple[PretrainingLosses, Batch]]:
        self.engine.eval()
        for batch in micro_batches:
            self.heartbeat.enter("evaluation")
            yield self._forward(batch), batch

    def _forward(self, batch: Batch) -> PretrainingLosses:
        arrays = (batch.input_ids_BL, batch.segment_BL, batch.valid_BL, batch.masked_index_M, batch.masked_label_M)
        # A batch may lie in page-locked memory, which its next owner overwrites. A training step holds its batches
        # until it has waited for the losses; an evaluation lets them go one by one, so it waits for each copy.
        is_held = self.engine.module.training
        tensors = [torch.from_numpy(array).to(self.device, non_blocking=is_held) for array in arrays]
        return PretrainingLosses(*self.engine(*tensors, batch.micro_batch_index))

    def _plain_grad_norm(self) -> float | None:
        """The gradient norm where DeepSpeed keeps none: fp32 without ZeRO. Gradients are averaged over ranks by now."""
        if zero_stage(self.config) > 0:
            return None
        squares = torch.zeros(2, device=self.device)  # of whole parameters, and of those that tensor ranks share
        for parameter in self.engine.module.parameters():
            if parameter.grad is not None:
                squares[int(is_tensor_parallel(parameter))] += parameter.grad.float().square().sum()
        if self.mesh.tensor_group is not None:
            distributed.all_reduce(squares[1:], group=self.mesh.tensor_group)
        return float(squares.sum().sqrt())
