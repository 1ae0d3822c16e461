"""What DeepSpeed is told: its configuration dictionary, made from the typed one.

Free of torch and of DeepSpeed, so that `--dry-run` and a wrong configuration need neither.
"""

from __future__ import annotations

from typing import Any

from pretrain.config import RunConfig
from pretrain.errors import ConfigError

# Set from the typed configuration; the same key in the `deepspeed:` table would be a second, contradicting source.
OWNED_DEEPSPEED_KEYS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "gradient_clipping": "optim.clip_grad_norm",
    "optimizer": "optim.name",
    "scheduler": "optim.schedule",
    "fp16": "precision",
    "bf16": "precision",
    "bfloat16": "precision",
    "zero_optimization": "zero.stage",
    "checkpoint": "checkpoint.*",
    "pipeline": "parallel.pipeline",
    "steps_per_print": "train.log_every",
}


def zero_stage(config: RunConfig) -> int:
    """The ZeRO stage that will run.

    16-bit training needs stage 1 for its fp32 master weights to be handled well, and a pipeline needs it because
    DeepSpeed clips by a wrong norm there without ZeRO.
    """
    if config.zero.stage == 0 and (config.precision != "fp32" or config.parallel.pipeline > 1):
        return 1
    return config.zero.stage


def check_passed_through(config: RunConfig) -> list[str]:
    """Keys of the `deepspeed:` table that the typed configuration owns, each with its home."""
    return [
        f"deepspeed.{key} is set by {home}; remove it from the deepspeed: table"
        for key, home in OWNED_DEEPSPEED_KEYS.items()
        if key in config.deepspeed
    ]


def build_ds_config(config: RunConfig, dp_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a run on `dp_size` data-parallel ranks.

    Raises:
        ConfigError: the `deepspeed:` table holds a key that the typed configuration owns (a loaded one holds none).
    """
    owned = check_passed_through(config)
    if owned:
        raise ConfigError("; ".join(owned))
    zero: dict[str, Any] = {
        "stage": zero_stage(config),
        "reduce_bucket_size": config.zero.reduce_bucket_size,
        "allgather_bucket_size": config.zero.allgather_bucket_size,
        "overlap_comm": config.zero.overlap_comm and config.parallel.pipeline == 1,  # pipelines cannot
    }
    if zero["stage"] == 3:
        # BERT's layers are small: keep what fits the bucket gathered, and never leave an unsharded small parameter out.
        zero["stage3_param_persistence_threshold"] = 100_000
    return {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.grad_accum_steps(dp_size),
        "gradient_clipping": config.optim.clip_grad_norm,
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # LAMB is ours and knows about slices
        "steps_per_print": 10**9,  # the trainer reports
        # Halves of tensors would be sent between stages, and only tuples with one tensor can be cut that way.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        **config.deepspeed,
    }
