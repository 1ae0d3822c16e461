"""Which classes the model is built from: plain torch modules, or megatron-core's tensor-parallel ones.

The only place in the model that knows about tensor parallelism. `layers.py` asks a `LayerSpec` for its linears and
embeddings; all of them map a tensor to a tensor, so the layers read the same either way.

Column-parallel linears split their output features, row-parallel ones their input features, the word matrix and the
vocabulary bias split the words (Shoeybi et al. 2019, Megatron-LM, section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.errors import ConfigError


@dataclass(frozen=True)
class LayerSpec:
    """Builders of the parts that differ between layouts, and this rank's place among those that share a matrix."""

    word_embedding: Callable[[int, int], nn.Module]
    """(vocabulary size, hidden size); called with ids, or with hidden states and decode=True."""
    column_linear: Callable[[int, int], nn.Module]
    row_linear: Callable[[int, int], nn.Module]
    vocabulary_parameter: Callable[[int], nn.Parameter]
    linear: Callable[[int, int], nn.Module]
    embedding: Callable[[int, int], nn.Module]
    layer_norm: Callable[[int, float], nn.Module]
    tp_rank: int = 0
    tp_size: int = 1


# `reset_parameters` does nothing in these classes because `initialise.py` fills every parameter once, by name.


class Linear(nn.Linear):
    """torch's linear without its own initial values."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class Embedding(nn.Embedding):
    """torch's embedding without its own initial values."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class WordEmbedding(Embedding):
    """The tied word matrix [V, D], and nothing else.

    Decoding is a call of the same module, not a look at its weight from outside: ZeRO-3 gathers a partitioned weight
    when its module is called, and a pipeline calls a tied module in two stages.
    """

    def forward(self, input: Tensor, decode: bool = False) -> Tensor:
        """Embeddings [..., D] of ids [...]; with `decode`, logits [M, V] of hidden states [M, D]."""
        return F.linear(input, self.weight) if decode else F.embedding(input, self.weight)


def _layer_norm(size: int, eps: float) -> nn.LayerNorm:
    return nn.LayerNorm(size, eps=eps)


def plain_layers() -> LayerSpec:
    """Whole matrices in plain torch modules; imports nothing of megatron-core."""
    return LayerSpec(
        word_embedding=WordEmbedding,
        column_linear=Linear,
        row_linear=Linear,
        vocabulary_parameter=lambda vocab_size: nn.Parameter(torch.empty(vocab_size)),
        linear=Linear,
        embedding=Embedding,
        layer_norm=_layer_norm,
    )


class _NoExtraState(nn.Module):
    """Keeps an `_extra_state` of None out of state dicts, on which DeepSpeed's checkpoint converters stumble.

    megatron-core's linears write it, and add it by a hook to whatever they load; the hook goes in their constructors.
    """

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state


def tensor_parallel_layers() -> LayerSpec:
    """Matrices split over the tensor-parallel group, which megatron-core's `parallel_state` must know already.

    Every parameter is allocated on the CPU; `initialise.py` draws the full matrix by name and each rank keeps its part.
    The logits of a rank cover its own words only. Importing megatron-core takes seconds, hence here.
    """
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.model_parallel_config import ModelParallelConfig

    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    # Without perform_initialization megatron-core forgets to mark the parameters as tensor-parallel, and gradient norms
    # come out wrong; so it "initialises" with a function that does nothing.
    config = ModelParallelConfig(
        tensor_model_parallel_size=tp_size, use_cpu_initialization=True, perform_initialization=True
    )

    def leave(weight: Tensor) -> None:
        return None

    class ColumnLinear(_NoExtraState, tensor_parallel.ColumnParallelLinear):
        def __init__(self, in_features: int, out_features: int) -> None:
            _check_split("output features", out_features, tp_size)
            super().__init__(in_features, out_features, config=config, init_method=leave)
            self._load_state_dict_pre_hooks.clear()

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)[0]

    class RowLinear(_NoExtraState, tensor_parallel.RowParallelLinear):
        def __init__(self, in_features: int, out_features: int) -> None:
            _check_split("input features", in_features, tp_size)
            super().__init__(
                in_features,
                out_features,
                config=config,
                init_method=leave,
                bias=True,
                input_is_parallel=True,
                skip_bias_add=False,
            )
            self._load_state_dict_pre_hooks.clear()

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)[0]

    class ParallelWordEmbedding(tensor_parallel.VocabParallelEmbedding):
        def __init__(self, vocab_size: int, size: int) -> None:
            _check_split("words", vocab_size, tp_size)
            super().__init__(vocab_size, size, init_method=leave, config=config)

        def forward(self, input: Tensor, decode: bool = False) -> Tensor:
            if not decode:
                return super().forward(input)
            return tensor_parallel.layers.linear_with_grad_accumulation_and_async_allreduce(
                input=input,
                weight=self.weight,
                bias=None,
                gradient_accumulation_fusion=False,
                allreduce_dgrad=tp_size > 1,
                sequence_parallel=False,
                tp_group=self.tp_group,
            )

    def vocabulary_parameter(vocab_size: int) -> nn.Parameter:
        _check_split("words", vocab_size, tp_size)
        parameter = nn.Parameter(torch.empty(vocab_size // tp_size))
        tensor_parallel.set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
        return parameter

    return LayerSpec(
        word_embedding=ParallelWordEmbedding,
        column_linear=ColumnLinear,
        row_linear=RowLinear,
        vocabulary_parameter=vocabulary_parameter,
        linear=Linear,
        embedding=Embedding,
        layer_norm=_layer_norm,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=tp_size,
    )


def _check_split(what: str, number: int, tp_size: int) -> None:
    if number % tp_size:
        raise ConfigError(
            f"{number} {what} cannot be split over parallel.tensor ({tp_size}); choose a divisor of {number}, "
            f"or pad to {-(-number // tp_size) * tp_size}"
        )
