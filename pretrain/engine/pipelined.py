"""DeepSpeed's PipelineEngine behind the class of `engine.py`: a model split into stages, with ZeRO-1.

Separate from `engine.py`, because a run without a pipeline should not import it. Only the last stage knows the losses;
the collective that ends a step passes them to the others.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from pretrain.config.sections import RunConfig
from pretrain.data.batches import Batch
from pretrain.engine.engine import Engine
from pretrain.engine.token_mean import TokenMean
from pretrain.model.pipeline import BertPipeline
from pretrain.model.pretraining import PretrainingLosses
from pretrain.model.token_rows import TokenRows
from pretrain.parallel.mesh import Mesh
from pretrain.resilience.heartbeat import Heartbeat

# Instructions in which a stage waits for no other stage.
_WORK = frozenset({"data", "load micro batch", "forward pass", "backward pass"})
_OPTIMIZER_STEP = "optimizer step"


class PipelinedEngine(Engine):
    """PipelineEngine around a `model.pipeline.BertPipeline`."""

    def __init__(
        self,
        config: RunConfig,
        model: BertPipeline,
        device: torch.device,
        mesh: Mesh,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        # DeepSpeed sends tensors between stages by collectives inside autograd's backward, and torch warns of that.
        warnings.filterwarnings(
            "ignore", category=UserWarning, message="c10d::.* an autograd kernel was not registered"
        )
        self._token_mean: TokenMean | None = None
        super().__init__(config, model, device, mesh, heartbeat)
        self._run_optimizer_step = self._watch_instructions()

    def _watch_instructions(self) -> Callable[[Any], None]:
        """Let the heartbeat see each instruction of DeepSpeed's schedule, and take out the optimizer's step.

        The step is the last instruction of every stage; `_step_optimizer` runs it, once the losses have been checked.

        Returns:
            The instruction that was taken out; its argument is DeepSpeed's engine.
        """
        if not self.clock.is_used:
            self.heartbeat.work_stages = _WORK
        instructions = {
            _in_words(instruction): (instruction, run) for instruction, run in self.engine._INSTRUCTION_MAP.items()
        }
        optimizer_step, run_optimizer_step = instructions.pop(_OPTIMIZER_STEP)
        watched = {instruction: self._watched(name, run) for name, (instruction, run) in instructions.items()}
        self.engine._INSTRUCTION_MAP = {**watched, optimizer_step: lambda engine: None}
        return self._watched(_OPTIMIZER_STEP, run_optimizer_step)

    def _watched(self, name: str, run: Callable[..., None]) -> Callable[..., None]:
        """The instruction, seen by the heartbeat (each stage has its own sequence) and timed if it is work."""

        def run_watched(engine: Any, **arguments: Any) -> None:
            if name == "forward pass" and engine.is_last_stage():
                self._await_counts()
            self.heartbeat.enter(name, in_lockstep=False)
            with self.clock.running() if name in _WORK else contextlib.nullcontext():
                run(engine, **arguments)

        return run_watched

    def _forward_backward(
        self, micro_batches: Sequence[Batch], token_mean: TokenMean | None
    ) -> list[PretrainingLosses]:
        engine, self._token_mean = self.engine, token_mean
        engine.module.expect(self._announced(micro_batches), token_mean and token_mean.weigh)
        engine.module.train()
        engine.set_dataiterator(map(_inputs_and_labels, micro_batches))
        engine.total_loss = engine.total_additional_losses = None
        engine._compute_loss = True
        # Not `train_batch`: it would end with two collectives for a loss that nobody reads.
        engine._exec_schedule(engine._train_schedule())
        losses: list[PretrainingLosses] = engine.module.losses
        return losses

    def _announced(self, micro_batches: Iterable[Batch]) -> Iterator[tuple[int, TokenRows]]:
        for batch in micro_batches:
            rows = self.engine.module.plan_rows(batch.segment_BL).to(self.device, non_blocking=True)
            yield batch.micro_batch_index, rows

    def _await_counts(self) -> None:
        """Wait for the other data-parallel ranks' masked tokens outside the forward pass, whose time is the rank's own.

        They are there by now, unless a rank was late with its data: activations have come through all other stages.
        """
        if self._token_mean is not None:
            self.heartbeat.enter("count of masked tokens", in_lockstep=False)
            self._token_mean.wait()
            self._token_mean = None

    def _step_optimizer(self) -> None:
        self._run_optimizer_step(self.engine)

    def _run_evaluation(self, micro_batches: Iterable[Batch]) -> Iterator[tuple[PretrainingLosses, Batch]]:
        batches = list(micro_batches)  # DeepSpeed's schedule must know how many there are
        self.engine.module.expect(self._announced(batches))
        self.engine.eval_batch(
            data_iter=map(_inputs_and_labels, batches), bcast_loss=False, num_micro_batches=len(batches)
        )
        if self.engine.is_last_stage():
            yield from zip(self.engine.module.losses, batches, strict=True)


def _in_words(instruction: type) -> str:
    """ForwardPass -> forward pass."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", instruction.__name__).lower()


def _inputs_and_labels(batch: Batch) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """The inputs of the first stage, and the labels that the last one compares with."""
    segment_BL, masked_index_M = torch.from_numpy(batch.segment_BL), torch.from_numpy(batch.masked_index_M)
    inputs = (torch.from_numpy(batch.input_ids_BL), segment_BL, masked_index_M)
    labels = (torch.from_numpy(batch.masked_label_M), torch.from_numpy(batch.valid_BL), segment_BL, masked_index_M)
    return inputs, labels
