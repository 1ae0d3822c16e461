"""DeepSpeed's PipelineEngine behind the four verbs of `engine.py`: a model cut into stages, with ZeRO-1.

Apart from `engine.py`, because a run without a pipeline should not import it. Losses are known on the last stage only;
the collective that ends a step tells them to the others.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from pretrain.config.sections import RunConfig
from pretrain.data.batches import Batch
from pretrain.engine.engine import Engine, StepOutcome, Veto
from pretrain.model.pipeline import BertPipeline
from pretrain.model.pretraining import PretrainingLosses
from pretrain.parallel.mesh import Mesh
from pretrain.resilience.heartbeat import Heartbeat

# Instructions in which a stage waits for no other one.
_WORK = frozenset({"data", "load micro batch", "forward pass", "backward pass"})


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
        super().__init__(config, model, device, mesh, heartbeat)
        self._is_vetoed: Veto = lambda _: False
        self._tell_instructions()
        if hasattr(self.engine.optimizer, "scaled_global_norm"):
            self.engine.optimizer.scaled_global_norm = lambda norm_type=2: _global_norm(self.engine.optimizer)

    def _tell_instructions(self) -> None:
        """Let the heartbeat know which instruction of DeepSpeed's schedule runs; each stage has its own sequence."""
        if not self.clock.is_used:
            self.heartbeat.work_stages = _WORK

        def told(name: str, instruction: Callable[..., None]) -> Callable[..., None]:
            def call(engine: Any, **arguments: Any) -> None:
                self.heartbeat.enter(name, in_lockstep=False)
                with self._around(name):
                    instruction(engine, **arguments)

            return call

        instructions = self.engine._INSTRUCTION_MAP.items()
        self.engine._INSTRUCTION_MAP = {kind: told(_in_words(kind), function) for kind, function in instructions}

    def _around(self, name: str) -> AbstractContextManager[None]:
        """What an instruction needs about it: a clock, or a look at the losses before the optimizer's step."""
        if name == "optimizer step":
            return self._no_update(unless=not self._is_vetoed(self.engine.module.losses))
        return self.clock.running() if name in _WORK else contextlib.nullcontext()

    def _run_step(self, micro_batches: Sequence[Batch], is_vetoed: Veto) -> StepOutcome:
        self._is_vetoed = is_vetoed
        self.engine.module.expect(batch.micro_batch_index for batch in micro_batches)
        self.engine.train_batch(data_iter=map(_inputs_and_labels, micro_batches))
        return self.engine.module.losses, None

    def _run_evaluation(self, micro_batches: Iterable[Batch]) -> Iterator[tuple[PretrainingLosses, Batch]]:
        batches = list(micro_batches)  # DeepSpeed's schedule must know how many there are
        self.engine.module.expect(batch.micro_batch_index for batch in batches)
        self.engine.eval_batch(
            data_iter=map(_inputs_and_labels, batches), bcast_loss=False, num_micro_batches=len(batches)
        )
        if self.engine.is_last_stage():
            yield from zip(self.engine.module.losses, batches, strict=True)


def _in_words(instruction: type) -> str:
    """ForwardPass -> forward pass."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", instruction.__name__).lower()


def _global_norm(zero: Any) -> torch.Tensor:
    """The norm of all gradients of all stages, in one sum over the ranks; infinity where a gradient is no number.

    DeepSpeed sums over the stages once per parameter group. LAMB has a group per parameter and stages have different
    numbers of them, so that they would wait for each other for ever.
    """
    if zero.cpu_offload:
        everything = [parameter for parameters in zero.params_in_partition for parameter in parameters]
        norm = zero.complete_grad_norm_calculation_for_cpu_offload(everything)
    else:
        pairs = [
            pair
            for group, parameters in enumerate(zero.params_in_partition)
            for pair in zip(_without_padding(zero.averaged_gradients[group]), parameters, strict=False)
        ]
        norm = zero.get_grad_norm_direct([gradient for gradient, _ in pairs], [parameter for _, parameter in pairs])
    return torch.where(norm < 0, torch.inf, norm)  # DeepSpeed says -1


def _without_padding(gradients: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    return (gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False))


def _inputs_and_labels(batch: Batch) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """What the first stage takes and what the last one compares with."""
    segment_BL, masked_index_M = torch.from_numpy(batch.segment_BL), torch.from_numpy(batch.masked_index_M)
    inputs = (torch.from_numpy(batch.input_ids_BL), segment_BL, masked_index_M)
    labels = (torch.from_numpy(batch.masked_label_M), torch.from_numpy(batch.valid_BL), segment_BL, masked_index_M)
    return inputs, labels
