"""How a pipeline distributes the encoder: by modelled time per stage, head and losses included, not by parameters.

Times are in floating-point operations of the forward pass per micro-batch; backward is twice that everywhere, so it
changes no ratio.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.config.sections import RunConfig
from pretrain.data.masking import predictions_per_row


@dataclass(frozen=True)
class StagePlan:
    """Encoder layers of each stage, what each stage costs (operations), and the share of time that stages wait."""

    layers: tuple[int, ...]
    costs: tuple[float, ...]
    bubble: float


def plan_stages(config: RunConfig, vocab_size: int, num_micro_batches: int) -> StagePlan:
    """The distribution that makes the slowest stage fastest, or the one that `parallel.stage_layers` sets.

    The bubble is that of 1F1B (Narayanan et al. 2021): m micro-batches through p stages take m + p - 1 times the
    slowest stage; a stage waits for the part of that time that it does not use.
    """
    num_stages = config.parallel.pipeline
    layer, first, last = layer_cost(config), 0.0, last_stage_cost(config, vocab_size)
    layers = config.parallel.stage_layers or _distribute(config.model.num_layers, num_stages, layer, last)
    costs = [number * layer for number in layers]
    costs[0] += first
    costs[-1] += last
    slots = num_micro_batches + num_stages - 1
    busy = num_micro_batches * sum(costs) / num_stages
    return StagePlan(tuple(layers), tuple(costs), 1 - busy / (slots * max(costs)))


def layer_cost(config: RunConfig) -> float:
    """Operations of one encoder layer: its four matrices, and attention over the whole row."""
    model, length = config.model, config.data.seq_length
    size, inner_size = model.hidden_size, model.ffn_hidden_size
    per_token = 2 * (4 * size * size + 2 * size * inner_size) + 4 * length * size
    return float(config.train.micro_batch_size * length * per_token)


def last_stage_cost(config: RunConfig, vocab_size: int) -> float:
    """Operations after the encoder: the vocabulary head on masked positions, and the dot products of the contrast."""
    model, objective, length = config.model, config.objective, config.data.seq_length
    masked = predictions_per_row(objective.mask_rate, length - 2)
    head = 2 * masked * model.hidden_size * (model.hidden_size + vocab_size)
    contrast = 4 * length * (objective.num_negatives + 1) * model.hidden_size if config.is_contrastive else 0
    return float(config.train.micro_batch_size * (head + contrast))


def _distribute(num_layers: int, num_stages: int, layer: float, last: float) -> tuple[int, ...]:
    """As even as whole layers allow, with fewer on the last stage, and at least one on each."""
    best: tuple[float, tuple[int, ...]] | None = None
    for in_last in range(1, num_layers - num_stages + 2):
        share, rest = divmod(num_layers - in_last, num_stages - 1)
        layers = tuple(share + (stage < rest) for stage in range(num_stages - 1)) + (in_last,)
        slowest = max(max(layers[:-1]) * layer, in_last * layer + last)
        # On a tie, more layers at the end: the stages before it hold more micro-batches in memory.
        if best is None or slowest <= best[0]:
            best = slowest, layers
    assert best is not None  # check_config refuses more stages than layers
    return best[1]
