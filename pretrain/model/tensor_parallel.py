"""Layers whose matrices are split over the tensor-parallel group: megatron-core's linears and word matrix, adapted.

The only module of the model that knows megatron-core. Importing it takes seconds, so it is imported only if a layout
needs it, after `parallel.start_mesh`. Every parameter is allocated on the CPU; `initialise.py` draws the full matrix by
name and each rank keeps its part. The logits of a rank cover only its own words.

With sequence parallelism (Korthikanti et al. 2022, "Reducing Activation Recomputation", section 4.2) the hidden states
between the linears are split over the tokens. Parameters that are not split but see only a share of the tokens,
LayerNorm weights and row biases, sum their gradients over the group.

Shape letters: T tokens, S = T / tp of them, D hidden, M masked positions, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as distributed
from megatron.core import parallel_state, tensor_parallel
from megatron.core.model_parallel_config import ModelParallelConfig
from torch import Tensor, nn

from pretrain.errors import ConfigError
from pretrain.model.layer_spec import Embedding, LayerNorm, LayerSpec, Linear, with_words
from pretrain.planner.vocabulary import padded_vocab_size


def tensor_parallel_layers(*, sequence_parallel: bool = False) -> LayerSpec:
    """The layers of this rank in the tensor-parallel group of megatron-core's `parallel_state`."""
    group = parallel_state.get_tensor_model_parallel_group()
    tp_size = distributed.get_world_size(group)
    # Without perform_initialization megatron-core does not mark the parameters as tensor-parallel, and gradient norms
    # come out wrong; so it "initialises" with a function that does nothing.
    config = ModelParallelConfig(
        tensor_model_parallel_size=tp_size,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        perform_initialization=True,
    )
    layers = LayerSpec(
        word_embedding=partial(WordEmbedding, config),
        column_linear=partial(ColumnLinear, config),
        row_linear=partial(RowLinear, config),
        vocabulary_parameter=partial(_vocabulary_parameter, tp_size),
        linear=Linear,
        embedding=Embedding,
        layer_norm=LayerNorm,
        # The tokens are not split, so each rank's gradient of h and e covers only its own anchors until it is summed.
        share_contrast=partial(_share_contrast, group),
        sum_contrast=tensor_parallel.reduce_from_tensor_model_parallel_region,
        tp_rank=distributed.get_rank(group),
        tp_size=tp_size,
        tensor_group=group,
    )
    return (
        layers
        if not sequence_parallel
        else layers.with_split_tokens(
            layer_norm=SharedLayerNorm,
            scatter_tokens=tensor_parallel.scatter_to_sequence_parallel_region,
            gather_tokens=_gather_tokens,
        )
    )


def _gather_tokens(part_SD: Tensor) -> Tensor:
    """All tokens [T, D]; every rank computes the same from here on, so each takes its own slice of the gradient."""
    gathered: Tensor = tensor_parallel.gather_from_sequence_parallel_region(part_SD, tensor_parallel_output_grad=False)
    return gathered


class _NoExtraState(nn.Module):
    """Keeps an `_extra_state` of None out of state dicts, because DeepSpeed's checkpoint converters fail on it.

    megatron-core's linears write it, and a hook adds it to what they load; the constructors below remove the hook.
    """

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state


def _no_init(weight: Tensor) -> None:
    return None


class ColumnLinear(_NoExtraState, tensor_parallel.ColumnParallelLinear):
    """A linear that computes its share of the output features, for all tokens."""

    def __init__(self, config: ModelParallelConfig, in_features: int, out_features: int) -> None:
        _check_split("output features", out_features, config.tensor_model_parallel_size)
        super().__init__(in_features, out_features, config=config, init_method=_no_init)
        self._load_state_dict_pre_hooks.clear()

    def forward(self, input: Tensor) -> Tensor:
        """[T, out / tp] of [T, in], or of [S, in] with sequence parallelism."""
        return super().forward(input)[0]


class RowLinear(_NoExtraState, tensor_parallel.RowParallelLinear):
    """A linear that takes its share of the input features and sums the outputs over the group."""

    def __init__(self, config: ModelParallelConfig, in_features: int, out_features: int) -> None:
        _check_split("input features", in_features, config.tensor_model_parallel_size)
        super().__init__(
            in_features,
            out_features,
            config=config,
            init_method=_no_init,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=True,
        )
        self._load_state_dict_pre_hooks.clear()

    def forward(self, input: Tensor) -> Tensor:
        """[T, out] of [T, in / tp]; [S, out] with sequence parallelism."""
        output, bias = super().forward(input)
        return output + (_sum_gradient(bias) if self.sequence_parallel else bias)


class WordEmbedding(tensor_parallel.VocabParallelEmbedding):
    """The tied word matrix, split by words; see `layer_spec.WordEmbedding`."""

    def __init__(self, config: ModelParallelConfig, vocab_size: int, size: int) -> None:
        super().__init__(
            padded_vocab_size(vocab_size, config.tensor_model_parallel_size),
            size,
            init_method=_no_init,
            config=config,
            reduce_scatter_embeddings=config.sequence_parallel,
        )
        with_words(self.weight, vocab_size)

    def forward(self, input: Tensor, decode: bool = False) -> Tensor:
        """Embeddings [T, D] ([S, D] with sequence parallelism) of ids [T]; with `decode`, logits [M, V / tp]."""
        if not decode and self.reduce_scatter_embeddings:
            # megatron-core swaps rows and columns before it splits: [1, T] ids become [S, 1, D].
            return super().forward(input[None])[:, 0]
        if not decode:
            return super().forward(input)
        logits: Tensor = tensor_parallel.layers.linear_with_grad_accumulation_and_async_allreduce(
            input=input,
            weight=self.weight,
            bias=None,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=True,
            sequence_parallel=False,
            tp_group=self.tp_group,
        )
        return logits


class SharedLayerNorm(LayerNorm):
    """A LayerNorm that every rank applies to its own tokens."""

    def shared_parameters(self) -> tuple[Tensor, Tensor]:
        """Weight and bias, whose gradients are summed over the ranks."""
        return _sum_gradient(self.weight), _sum_gradient(self.bias)


def _sum_gradient(parameter: Tensor) -> Tensor:
    shared: Tensor = tensor_parallel.copy_to_tensor_model_parallel_region(parameter)
    return shared


def _vocabulary_parameter(tp_size: int, vocab_size: int) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(padded_vocab_size(vocab_size, tp_size) // tp_size))
    tensor_parallel.set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
    return with_words(parameter, vocab_size)


def _share_contrast(group: distributed.ProcessGroup, hidden_TD: Tensor, embedding_TD: Tensor) -> tuple[Tensor, Tensor]:
    hidden_TD, embedding_TD = _SumOpposites.apply(group, hidden_TD, embedding_TD)
    return hidden_TD, embedding_TD


class _SumOpposites(torch.autograd.Function):
    """Both tensors unchanged; their gradients, each the other's negative, summed over the group in one collective."""

    @staticmethod
    def forward(ctx: Any, group: distributed.ProcessGroup, hidden: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        ctx.group = group
        return hidden.view_as(hidden), embedding.view_as(embedding)

    @staticmethod
    def backward(ctx: Any, grad_hidden: Tensor, grad_embedding: Tensor) -> tuple[None, Tensor, Tensor]:  # type: ignore[override]
        total = grad_hidden.contiguous()
        distributed.all_reduce(total, group=ctx.group)
        return None, total, -total


def _check_split(what: str, number: int, tp_size: int) -> None:
    if number % tp_size:
        raise ConfigError(
            f"{number} {what} cannot be split over parallel.tensor ({tp_size}); choose a divisor of {number}, "
            f"or pad to {-(-number // tp_size) * tp_size}"
        )
