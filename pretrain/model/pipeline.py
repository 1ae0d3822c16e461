"""BERT split into pipeline stages: the layers of `layers.py` as DeepSpeed's PipelineModule runs them.

Stages send each other (h, e, segment, masked_index): e with its gradient, since recomputing it on the last stage would
drop other units; without the contrastive loss e is not sent. Parameters have the same names as in `bert.py`. The first
stage has the embeddings, the last one the head and the losses; the encoder layers are distributed so that the slowest
stage is as fast as possible.

DeepSpeed's stages exchange tensors of one shape, so padding is computed too: it stands after all other tokens, in
documents of its own.

Shape letters: B rows, L tokens per row, T = B * L tokens in the order of `TokenRows`, D hidden, M masked positions, V
vocabulary.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from deepspeed.pipe import LayerSpec as StageLayer
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.config.sections import ModelSection, ObjectiveSection
from pretrain.errors import counted
from pretrain.model.attention import with_mask
from pretrain.model.compiled import CompiledFunction
from pretrain.model.dropout import DropoutKey
from pretrain.model.initialise import initialise
from pretrain.model.layer_spec import LayerSpec
from pretrain.model.layers import (
    EmbeddingLayer,
    EncoderLayer,
    MlmTransform,
    VocabularyBias,
    compile_encoder_layer,
)
from pretrain.model.pretraining import LossHead, PretrainingLosses
from pretrain.model.token_rows import TokenRows, full_rows, plan_rows

Tensors = tuple[Tensor, ...]


class BertPipeline(PipelineModule):
    """One stage of BERT with both objectives.

    Args:
        stage_layers: encoder layers per stage.
        grid: pipeline, data and tensor sizes.
    """

    def __init__(
        self,
        config: ModelSection,
        vocab_size: int,
        layers: LayerSpec,
        objective: ObjectiveSection,
        *,
        seed: int,
        stage_layers: Sequence[int],
        grid: tuple[int, int, int],
        recompute_layers: int = 0,
        has_padding: bool = True,
        separate_documents: bool = False,
    ) -> None:
        self.vocab_size = vocab_size
        self.config = config
        self._bounds = _layer_bounds(stage_layers)
        self.losses: list[PretrainingLosses] = []
        self._micro_batches: Iterator[tuple[int, TokenRows]] = iter(())
        self._weigh: Callable[[PretrainingLosses], PretrainingLosses] | None = None
        self._seed = seed
        self._micro_batch_index = 0
        self._key: DropoutKey | None = None
        self._rows = TokenRows(0, 0)
        self._options = options = StageOptions(
            lambda: self._key, lambda: self._rows, recompute_layers, has_padding, separate_documents
        )
        head = LossHead(objective, vocab_size, layers, seed)
        pipe, data, tensor = grid
        topology = PipeModelDataParallelTopology(num_pp=pipe, num_dp=data, num_mp=tensor)
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its seeds
            super().__init__(
                _stage_layers(config, vocab_size, layers, options, has_embedding=objective.contrastive_weight > 0),
                topology=topology,
                loss_fn=lambda outputs, labels: self._loss(head, outputs, labels),
            )
        self.layers = layers
        self._options = options
        self.compiled_parts: list[CompiledFunction] = []
        initialise(self, layers, initializer_range=config.initializer_range, seed=seed)

    def plan_rows(self, segment_BL: np.ndarray) -> TokenRows:
        """Which tokens of a micro-batch stand where in this model, on the CPU; all of them are computed."""
        options = self._options
        if not options.has_padding and not options.separate_documents:
            return full_rows(*segment_BL.shape)
        return plan_rows(segment_BL, separate_documents=options.separate_documents, multiple=segment_BL.size)

    def compile_layers(self, key: str) -> None:
        """Let torch.compile make one graph for all encoder layers of this stage at the first call."""
        covers = counted(sum(isinstance(layer, EncoderStage) for layer in self.forward_funcs), "encoder layer")
        # DeepSpeed runs a stage's backward once per output, h and e.
        dynamic = self._options.has_padding or self._options.separate_documents
        compiled = compile_encoder_layer(self.layers, covers=covers, key=key, dynamic=dynamic, is_kept=True)
        self._options.run_layer, self.compiled_parts = compiled, [compiled]

    def expect(
        self,
        micro_batches: Iterable[tuple[int, TokenRows]],
        weigh: Callable[[PretrainingLosses], PretrainingLosses] | None = None,
    ) -> None:
        """Announce the next micro-batches, and forget the losses so far.

        Args:
            micro_batches: their numbers, which key dropout and pairs, and their `plan_rows` on the device.
            weigh: changes the losses of each of them before anything else sees them.
        """
        self._micro_batches, self._weigh = iter(micro_batches), weigh
        self.losses = []

    def forward(self, forward_input: Any) -> Any:
        """This stage's part of the next micro-batch."""
        # Stages see their micro-batches in order, so the number is not sent, and nothing waits for a GPU to read it.
        self._micro_batch_index, self._rows = next(self._micro_batches)
        self._key = None
        if self.training:
            device = next(iter(self.parameters())).device
            self._key = DropoutKey.of(self._seed, self._micro_batch_index, self.config.num_layers, device)
            self._key.seed_generator(self.layers.tp_rank, self._local_start)
        return super().forward(forward_input)

    def _loss(self, head: LossHead, outputs: Tensors, labels: Tensors) -> Tensor:
        logits_MV, bias_V, hidden_TD, *embedding = outputs
        masked_label_M, valid_BL, segment_BL, masked_index_M = labels
        losses = head(
            logits_MV,
            bias_V,
            hidden_TD,
            embedding[0] if embedding else None,
            segment_BL=segment_BL,
            valid_BL=valid_BL.bool(),
            masked_index_M=masked_index_M,
            masked_label_M=masked_label_M,
            micro_batch_index=self._micro_batch_index,
            rows=self._rows,
        )
        if self._weigh is not None:
            losses = self._weigh(losses)
        self.losses.append(PretrainingLosses(*(value.detach() for value in losses)))
        return losses.total

    def _partition_layers(self, method: str = "") -> None:
        self.parts = self._bounds
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])


class StageOptions:
    """What every layer of a stage needs besides its parameters; `key` and `rows` belong to the current micro-batch."""

    def __init__(
        self,
        key: Callable[[], DropoutKey | None],
        rows: Callable[[], TokenRows],
        recompute_layers: int,
        has_padding: bool,
        separate_documents: bool,
    ) -> None:
        self.key = key
        self.rows = rows
        self.recompute_layers = recompute_layers
        self.has_padding = has_padding
        self.separate_documents = separate_documents
        self.run_layer: Callable[..., Tensor] = EncoderLayer.forward

    def words(self, index: int) -> Tensor | None:
        """The words that key the dropout of a layer in the current micro-batch; None outside of training."""
        key = self.key()
        return None if key is None else key.at(index)


class EmbeddingStage(EmbeddingLayer):
    """Layer 1 in a pipeline."""

    def __init__(self, config: ModelSection, layers: LayerSpec, options: StageOptions, has_embedding: bool) -> None:
        super().__init__(config, layers)
        self.options = options
        self.has_embedding = has_embedding

    def forward(self, inputs: Tensors) -> Tensors:  # type: ignore[override]
        """(words, segment, masked_index) -> (h, e, segment, masked_index), or without e."""
        word_TD, segment_BL, masked_index_M = inputs
        embedding_TD = super().forward(word_TD, self.options.rows(), words_PW=self.options.words(1))
        # A copy, because one tensor sent twice would be one buffer with two gradients.
        hidden = (embedding_TD, embedding_TD.clone()) if self.has_embedding else (embedding_TD,)
        return (*hidden, segment_BL, masked_index_M)


class EncoderStage(EncoderLayer):
    """Layers 2 .. N + 1 in a pipeline."""

    def __init__(self, config: ModelSection, layers: LayerSpec, index: int, options: StageOptions) -> None:
        super().__init__(config, layers)
        self.index = index
        self.options = options
        self.is_recomputed = index - 2 < options.recompute_layers

    def forward(self, inputs: Tensors) -> Tensors:  # type: ignore[override]
        """(h, e, segment, masked_index) -> the same with the next h."""
        hidden_TD, *rest = inputs
        options = self.options
        rows = with_mask(options.rows(), rest[-2], self.layers.attention, separate_documents=options.separate_documents)
        arguments = (hidden_TD, rows, options.words(self.index))
        if self.is_recomputed and torch.is_grad_enabled():
            # Random state only for torch's attention on a GPU: all other dropout is a function of its key.
            hidden_TD = checkpoint(
                options.run_layer, self, *arguments, use_reentrant=False, preserve_rng_state=hidden_TD.is_cuda
            )
        else:
            hidden_TD = options.run_layer(self, *arguments)
        return (hidden_TD, *rest)


class TransformStage(MlmTransform):
    """Layer N + 2 in a pipeline: leaves sequence parallelism, and selects the masked positions."""

    def __init__(self, config: ModelSection, layers: LayerSpec, options: StageOptions) -> None:
        super().__init__(config, layers)
        self.layers = layers
        self.options = options

    def forward(self, inputs: Tensors) -> Tensors:  # type: ignore[override]
        """(h, e, segment, masked_index) -> (transformed, h, e), e only if it was sent."""
        *hidden, _, masked_index_M = inputs
        hidden = [self.layers.gather_tokens(part) for part in hidden]
        token_M = self.options.rows().find(masked_index_M)
        return (super().forward(hidden[0].index_select(0, token_M)), *hidden)


class BiasStage(VocabularyBias):
    """Layer N + 4 in a pipeline."""

    def forward(self, inputs: Tensors) -> Tensors:  # type: ignore[override]
        """(logits, h, e) -> (logits, bias, h, e)."""
        return (*super().forward(inputs[0]), *inputs[1:])


def _embed(options: StageOptions, word: nn.Module, inputs: Tensors) -> Tensors:
    input_ids_BL, segment_BL, masked_index_M = inputs
    return word(options.rows().take(input_ids_BL)), segment_BL, masked_index_M


def _decode(word: nn.Module, inputs: Tensors) -> Tensors:
    return (word(inputs[0], decode=True), *inputs[1:])


class _Word(TiedLayerSpec):
    """The tied word matrix; the class that holds it comes from the layer spec."""

    def __init__(self, build: Callable[[], nn.Module], forward: Callable[[nn.Module, Tensors], Tensors]) -> None:
        super().__init__("word", nn.Module, forward_fn=forward, tied_weight_attr="weight")
        self._make = build

    def build(self, log: bool = False) -> nn.Module:
        """The module."""
        return self._make()


def _stage_layers(
    config: ModelSection, vocab_size: int, layers: LayerSpec, options: StageOptions, *, has_embedding: bool
) -> list[StageLayer]:
    def word() -> nn.Module:
        return layers.word_embedding(vocab_size, config.hidden_size)

    encoder = [StageLayer(EncoderStage, config, layers, 2 + index, options) for index in range(config.num_layers)]
    return [
        _Word(word, partial(_embed, options)),
        StageLayer(EmbeddingStage, config, layers, options, has_embedding),
        *encoder,
        StageLayer(TransformStage, config, layers, options),
        _Word(word, _decode),
        StageLayer(BiasStage, vocab_size, layers),
    ]


def _layer_bounds(stage_layers: Sequence[int]) -> list[int]:
    """First layer of each stage, and the end: two layers before the encoder and three after it."""
    bounds = [0]
    for number in stage_layers:
        bounds.append(bounds[-1] + number)
    inner = [bound + 2 for bound in bounds[1:-1]]
    return [0, *inner, bounds[-1] + 5]
