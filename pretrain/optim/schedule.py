"""Learning-rate schedules as pure functions of the step.

The learning rate is computed from (step, configuration) at every step, so a resumed run needs no scheduler state.
"""

from __future__ import annotations

import math

from pretrain.config.sections import OptimSection


def learning_rate(step: int, optim: OptimSection, total_steps: int) -> float:
    """The learning rate of optimizer step `step` (0-based): linear warm-up, then linear, cosine or WSD decay.

    WSD (warm-up, stable, decay; Hu et al. 2024, MiniCPM, section 4) keeps the peak until the last `decay_steps`.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    floor = optim.lr * optim.min_lr_ratio
    remaining = optim.lr - floor
    if optim.schedule == "wsd":
        decay_steps = optim.decay_steps or max(1, total_steps // 10)
        start = max(total_steps - decay_steps, optim.warmup_steps)
    else:
        start = optim.warmup_steps
    progress = min(1.0, max(0.0, (step - start) / max(1, total_steps - start)))
    if optim.schedule == "cosine":
        return floor + remaining * 0.5 * (1.0 + math.cos(math.pi * progress))
    return floor + remaining * (1.0 - progress)
