"""Estimates how much memory a rank needs, from the formulas of ZeRO and of activations; imports no torch.

Weights, gradients and optimizer state: Rajbhandari et al. 2020, section 3 and 5, with the second fp32 copy of its share
of the weights that DeepSpeed keeps under ZeRO-1 to 3. Activations of a layer: what docs/model.md tells and
tests/model/test_kept_for_backward.py counts. Buckets, libraries and data come on top: half a gigabyte and more. The
estimate is for the first pipeline stage, which holds the most.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.config.deepspeed import zero_stage
from pretrain.config.sections import RunConfig
from pretrain.planner.vocabulary import padded_vocab_size

_GIB = 1 << 30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per rank, and the parameters of the whole model."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    num_parameters: int

    @property
    def total(self) -> int:
        """All of it, bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        shares = ("weights", "gradients", "optimizer", "activations")
        sizes = " + ".join(f"{name} {_in_gib(getattr(self, name))}" for name in shares)
        return f"{sizes} = {_in_gib(self.total)} GiB per rank, libraries and data not counted"


def estimate_memory(config: RunConfig, vocab_size: int, world_size: int) -> MemoryEstimate:
    """The memory of a rank of the first pipeline stage at the end of a forward pass, with `world_size` processes."""
    parallel, stage = config.parallel, zero_stage(config)
    dp_size = max(1, world_size // (parallel.tensor * parallel.pipeline))
    held = parameters_per_rank(config, padded_vocab_size(vocab_size, parallel.tensor))
    value_bytes = 4 if config.precision == "fp32" else 2
    # fp32 without ZeRO updates the weights themselves; all else has fp32 master weights besides both moments.
    optimizer = held * (8 if stage == 0 else 12)
    is_offloaded = config.zero.offload_optimizer.device != "none" and config.run.device != "cpu"
    return MemoryEstimate(
        weights=held * value_bytes // (dp_size if stage == 3 else 1),
        gradients=held * value_bytes // (dp_size if stage >= 2 else 1),
        optimizer=0 if is_offloaded else optimizer // (dp_size if stage >= 1 else 1),
        activations=_activations(config, vocab_size, dp_size),
        num_parameters=count_parameters(config, vocab_size),
    )


def _in_gib(size: int) -> str:
    return f"{size / _GIB:.{2 if size >= _GIB / 10 else 3}f}"


def count_parameters(config: RunConfig, vocab_size: int) -> int:
    """Parameters of the whole model with its prediction head, whose word matrix is the embedding's."""
    model = config.model
    hidden = model.hidden_size
    head = hidden * hidden + hidden + 2 * hidden + vocab_size
    return _embedding_parameters(config, vocab_size) + model.num_layers * _layer_parameters(config) + head


def parameters_per_rank(config: RunConfig, vocab_size: int) -> int:
    """Parameters that a rank of the first pipeline stage computes with; ZeRO shards their state further."""
    return _parameters_of_first_stage(config, vocab_size) // config.parallel.tensor


def _embedding_parameters(config: RunConfig, vocab_size: int) -> int:
    model = config.model
    return (vocab_size + model.max_position_embeddings + model.type_vocab_size + 2) * model.hidden_size


def _layer_parameters(config: RunConfig) -> int:
    """Four square matrices, two of the feed-forward part, their biases and two LayerNorms."""
    hidden, inner = config.model.hidden_size, config.model.ffn_hidden_size
    return 4 * hidden * hidden + 4 * hidden + 2 * hidden * inner + hidden + inner + 4 * hidden


def _parameters_of_first_stage(config: RunConfig, vocab_size: int) -> int:
    if config.parallel.pipeline == 1:
        return count_parameters(config, vocab_size)
    return _embedding_parameters(config, vocab_size) + _layers_of_first_stage(config) * _layer_parameters(config)


def _layers_of_first_stage(config: RunConfig) -> int:
    if config.parallel.stage_layers is not None:
        return config.parallel.stage_layers[0]
    return -(-config.model.num_layers // config.parallel.pipeline)


def _activations(config: RunConfig, vocab_size: int, dp_size: int) -> int:
    """Bytes kept for backward by the layers of the first stage, and by the logits if it is also the last one."""
    model, train, parallel = config.model, config.train, config.parallel
    value_bytes = 4 if config.precision == "fp32" else 2
    tokens = train.micro_batch_size * config.data.seq_length
    row = tokens * model.hidden_size * value_bytes
    shared = parallel.tensor if parallel.sequence else 1  # tensor parallelism alone splits none of this
    # Both outputs of LayerNorm; then query, key, value and context, and GELU's input and, unless it is computed again,
    # its output.
    inner = (1 if config.recomputes_elementwise else 2) * tokens * model.ffn_hidden_size * value_bytes
    layer = 2 * row // shared + (4 * row + inner) // parallel.tensor
    layers = _layers_of_first_stage(config)
    kept = max(0, layers - config.recompute_layers)
    recomputed = layers - kept
    in_flight = min(parallel.pipeline, config.grad_accum_steps(dp_size)) or 1
    in_layers = in_flight * (kept * layer + recomputed * row // shared) + (layer if recomputed else 0)
    # Their gradient takes their place.
    columns = padded_vocab_size(vocab_size, parallel.tensor) // parallel.tensor if parallel.pipeline == 1 else 0
    return in_layers + value_bytes * int(tokens * config.objective.mask_rate) * columns
