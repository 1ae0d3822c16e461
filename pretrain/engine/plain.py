"""The engine without a pipeline: tensor and data parallelism with ZeRO 0-3."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from pretrain.config.sections import RunConfig
from pretrain.data.batches import Batch
from pretrain.engine.batch_copies import BatchCopies, DeviceBatch
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
        self._copies = BatchCopies(device, model.plan_rows, has_varying_sizes=model.has_varying_sizes)

    def _forward_backward(
        self, micro_batches: Sequence[Batch], token_mean: TokenMean | None
    ) -> list[PretrainingLosses]:
        if not self.engine.module.training:  # it goes through all modules
            self.engine.train()
        own_losses = []
        underway = self._copies.start(micro_batches[0])
        for number in range(1, len(micro_batches) + 1):
            self.heartbeat.enter("forward")
            batch = self._copies.finish(underway)
            with self.clock.running():
                losses = self._forward(batch)
            if number < len(micro_batches):
                underway = self._copies.start(micro_batches[number])
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
            yield self._forward(self._copies.finish(self._copies.start(batch), is_released=True)), batch

    def _forward(self, batch: DeviceBatch) -> PretrainingLosses:
        return PretrainingLosses(*self.engine(*batch.tensors, batch.micro_batch_index, batch.rows))
