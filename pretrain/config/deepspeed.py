"""DeepSpeed's configuration dictionary, built from the typed configuration.

Imports neither torch nor DeepSpeed, so `--dry-run` and configuration errors need neither.
"""

from __future__ import annotations

from typing import Any

from pretrain.config.sections import RunConfig
from pretrain.errors import ConfigError

# Set from the typed configuration; the same key in the `deepspeed:` table would be a second, conflicting source.
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
    "torch_autocast": "precision",
    "amp": "precision",
    "zero_optimization": "zero.*",
    "communication_data_type": "zero.reduce_dtype",
    "data_types": "zero.grad_accum_dtype",
    "zero_force_ds_cpu_optimizer": "zero.offload_optimizer",
    "zero_allow_untested_optimizer": "optim.name",
    "compile": "train.compile",
    "checkpoint": "checkpoint.*",
    "pipeline": "parallel.pipeline",
    "steps_per_print": "train.log_every",
}


# The ZeRO stages that read each key of `zero`; DeepSpeed ignores the key in all others.
STAGES_OF_ZERO_KEYS = {
    "reduce_bucket_size": (1, 2, 3),
    "allgather_bucket_size": (1, 2),
    "overlap_comm": (1, 2, 3),
    "contiguous_gradients": (1, 2, 3),
    "round_robin_gradients": (1, 2),
    "stage3_prefetch_bucket_size": (3,),
    "stage3_param_persistence_threshold": (3,),
    "stage3_max_live_parameters": (3,),
    "stage3_max_reuse_distance": (3,),
    "zero_hpz_partition_size": (3,),
    "zero_quantized_weights": (3,),
    "zero_quantized_gradients": (3,),
    "offload_optimizer": (1, 2, 3),
    "offload_param": (3,),
}


def zero_stage(config: RunConfig) -> int:
    """The ZeRO stage that will run.

    16-bit training needs at least stage 1 so that its fp32 master weights are handled well. A pipeline needs it because
    without ZeRO DeepSpeed clips by a wrong norm there.
    """
    if config.zero.stage == 0 and (config.precision != "fp32" or config.parallel.pipeline > 1):
        return 1
    return config.zero.stage


def check_passed_through(config: RunConfig) -> list[str]:
    """Keys of the `deepspeed:` table that the typed configuration owns, each with the key that sets it."""
    return [
        f"deepspeed.{key} is set by {typed_key}; remove it from the deepspeed: table"
        for key, typed_key in OWNED_DEEPSPEED_KEYS.items()
        if key in config.deepspeed
    ]


def build_ds_config(config: RunConfig, dp_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a run on `dp_size` data-parallel ranks.

    Raises:
        ConfigError: the `deepspeed:` table holds a key that the typed configuration owns (`load_config` refuses those).
    """
    problems = check_passed_through(config)
    if problems:
        raise ConfigError("; ".join(problems))
    stage = zero_stage(config)
    return {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.grad_accum_steps(dp_size),
        "gradient_clipping": config.optim.clip_grad_norm,
        "bf16": {"enabled": config.weight_precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16", **config.fp16.model_dump()},
        "zero_optimization": {"stage": stage, **(_zero_options(config, stage) if stage else {})},
        "communication_data_type": reduce_dtype(config),
        "data_types": {"grad_accum_dtype": grad_accum_dtype(config)},
        "zero_allow_untested_optimizer": True,  # our LAMB handles ZeRO's slices
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW also updates offloaded state, and needs no build
        "steps_per_print": 10**9,  # the trainer reports
        # DeepSpeed would send parts of tensors between stages, and it can cut only tuples of one tensor that way.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        **config.deepspeed,
    }


def grad_accum_dtype(config: RunConfig) -> str:
    """The dtype in which gradients are summed over micro-batches."""
    dtype = config.zero.grad_accum_dtype
    return config.weight_precision if dtype == "auto" else dtype


def reduce_dtype(config: RunConfig) -> str:
    """The dtype in which gradients are summed over data-parallel ranks."""
    dtype = config.zero.reduce_dtype
    return grad_accum_dtype(config) if dtype == "auto" else dtype


def _zero_options(config: RunConfig, stage: int) -> dict[str, Any]:
    """The keys that DeepSpeed reads in `stage`, without an offload that is off."""
    options = config.zero.model_dump(mode="json", exclude_none=True)
    # A pipeline reduces after its last micro-batch.
    options.setdefault("overlap_comm", config.parallel.pipeline == 1)
    for name in ("offload_optimizer", "offload_param"):
        if options[name]["device"] == "none":
            del options[name]
    return {key: value for key, value in options.items() if stage in STAGES_OF_ZERO_KEYS.get(key, ())}
