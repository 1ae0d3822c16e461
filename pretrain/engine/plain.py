"""The engine without a pipeline: tensor and data parallelism with ZeRO 0-3."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from pretrain.config.sections import RunConfig
from pretrain.data.batches import Batch
from pretrain.engine.engine import Engine
from pretrain.engine.graphs import use_graphs
from pretrain.engine.token_mean import TokenMean
from pretrain.model.pretraining import BertForPretraining, PretrainingLosses
from pretrain.parallel.mesh import Mesh
from pretrain.resilience.heartbeat import Heartbeat


class PlainEngine(Engine):
    """DeepSpeedEngine: tensor and data parallelism with ZeRO 0-3, the whole depth of the model on every rank."""

    def __init__(
        self,
        config: RunConfig,
        model: BertForPretraining,
        device: torch.device,
        mesh: Mesh,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        super().__init__(config, model, device, mesh, heartbeat)
        # DeepSpeed has placed the parameters by now: graphs remember their addresses.
        use_graphs(config, model, device, mesh.dp_size)

    def _forward_backward(
        self, micro_batches: Sequence[Batch], token_mean: TokenMean | None
    ) -> list[PretrainingLosses]:
        if not self.engine.module.training:  # it goes through all modules
            self.engine.train()
        own_losses = []
        for number, batch in enumerate(micro_batches, start=1):
            self.heartbeat.enter("forward")
            with self.clock.running():
                losses = self._forward(batch)
            self.heartbeat.enter("backward")
            if token_mean is not None:  # here and not in forward, whose time is this rank's own
                with self.step_clock.communicating():
                    losses = token_mean.weigh(losses)
            with self._update.collecting(is_last=number == len(micro_batches)):
                self.engine.backward(losses.total)
            own_losses.append(PretrainingLosses(*(value.detach() for value in losses)))
            if number < len(micro_batches):
                self.engine.step()  # counts the micro-batch; the optimizer steps at the last one
        return own_losses

    def _step_optimizer(self) -> None:
        self.heartbeat.enter("optimizer")
        self.engine.step()

    def _run_evaluation(self, micro_batches: Iterable[Batch]) -> Iterator[tuple[PretrainingLosses, Batch]]:
        self.engine.eval()
        for batch in micro_batches:
            self.heartbeat.enter("evaluation")
            yield self._forward(batch), batch

    def _forward(self, batch: Batch) -> PretrainingLosses:
        arrays = (batch.input_ids_BL, batch.segment_BL, batch.valid_BL, batch.masked_index_M, batch.masked_label_M)
        # A batch may lie in page-locked memory, which its next owner overwrites. A training step holds its batches
        # until it has waited for the losses; an evaluation releases them one by one, so it waits for each copy.
        is_held = self.engine.module.training
        tensors = [torch.from_numpy(array).to(self.device, non_blocking=is_held) for array in arrays]
        rows = self.engine.module.plan_rows(batch.segment_BL).to(self.device, non_blocking=is_held)
        return PretrainingLosses(*self.engine(*tensors, batch.micro_batch_index, rows))
