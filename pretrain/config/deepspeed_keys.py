"""The keys of DeepSpeed's configuration that the `deepspeed:` table passes through, with the types of their values.

DeepSpeed looks up the keys that it knows and never looks at others, so a misspelt one would do nothing, without a word.
The table is that of DeepSpeed 0.19; a test compares it with what the installed DeepSpeed looks up. Kinds: a type, PATH,
ANY for what DeepSpeed itself does not describe, a tuple for options, a dictionary for a table.
"""

from __future__ import annotations

import difflib
from typing import Any, Final, Literal

from pretrain.config.deepspeed import OWNED_DEEPSPEED_KEYS
from pretrain.config.problems import Problems, show
from pretrain.config.values import WrongValueError, is_null, read, read_anything
from pretrain.config.yaml_tree import Node, Sequence, Table

PATH: Final = "path"
ANY: Final = "any"

_CURRICULUM = {"enabled": bool, "data_cluster_path": PATH, "curriculum_metrics": ANY}
_DYNAMIC_BATCHING = {
    "enabled": bool,
    "metrics_path": PATH,
    "lr_scaling_method": ("linear", "sqrt", "none"),
    "min_batch_size": int,
    "max_batch_size": int,
    "sequence_picking_order": ("random", "seqlen", "dataloader"),
    "max_tokens": int,
    "verbose": bool,
}
_DATA_SAMPLING = {
    "enabled": bool,
    "num_epochs": int,
    "num_workers": int,
    "pin_memory": bool,
    "curriculum_learning": _CURRICULUM,
    "dynamic_batching": _DYNAMIC_BATCHING,
}
_EXPERT_PARALLEL = {
    "enabled": bool,
    "autoep_size": int,
    "expert_tensor_parallel_size": int,
    "validate_folding_routing": bool,
    "async_split_plan": bool,
    "preset_model": str,
    "moe_layer_pattern": str,
    "expert_pattern": str,
    "router_pattern": str,
    "use_grouped_mm": bool,
    "disable_triton_grouped_mm": bool,
    "route_norm": bool,
    "route_scale": float,
    "score_apply": ("auto", "pre", "post"),
    "combine_impl": ("auto", "weighted_sum", "fused_weighted_sum", "legacy_bmm"),
    "row_weighting_impl": ("auto", "eager", "fused"),
    "gate_up_impl": ("separate", "fused"),
    "comm_backend": ("comm", "deepep"),
    "comm_num_sm": int,
    "comm_qp_margin": int,
    "comm_max_tokens_per_rank": int,
    "num_expert_groups": int,
    "num_limited_groups": int,
    "score_func": ("auto", "softmax", "sigmoid"),
    "top_k": ANY,
    "load_balance_coeff": ANY,
    "routed_scaling_factor": ANY,
    "expert_w1": str,
    "expert_w2": str,
    "expert_w3": ANY,
    "num_experts_attr": str,
    "top_k_attr": str,
    "has_shared_experts": bool,
    "shared_experts_pattern": str,
    "shared_experts_gate_pattern": str,
    "expert_activation": str,
}
_AUTOTUNING = {
    "enabled": bool,
    "fast": bool,
    "results_dir": PATH,
    "exps_dir": PATH,
    "overwrite": bool,
    "start_profile_step": int,
    "end_profile_step": int,
    "metric": str,
    "metric_path": PATH,
    "tuner_type": ("gridsearch", "random", "model_based"),
    "tuner_early_stopping": int,
    "tuner_num_trials": int,
    "arg_mappings": ANY,
    "model_info": {"profile": bool, "num_params": int, "hidden_size": int, "num_layers": int},
    "model_info_path": PATH,
    "mp_size": int,
    "max_train_batch_size": int,
    "min_train_batch_size": int,
    "max_train_micro_batch_size_per_gpu": int,
    "min_train_micro_batch_size_per_gpu": int,
    "num_tuning_micro_batch_sizes": int,
}
_TENSOR_PARALLEL_SIZES = {"tp_size": int, "tp_grain_size": int, "mpu": ANY, "tp_group": ANY}
_TENSOR_PARALLEL = {
    "dtype": ANY,
    "autotp_size": int,
    "tp_overlap_comm": bool,
    "vocab_parallel_lm_head": bool,
    "vocab_parallel_ce_backend": ("torch", "liger"),
    "tensor_parallel": _TENSOR_PARALLEL_SIZES,
    "tp": _TENSOR_PARALLEL_SIZES,
    "injection_policy_tuple": ANY,
    "partition_config": ANY,
    "preset_model": str,
    "keep_module_on_host": bool,
    "replace_with_kernel_inject": bool,
    "kernel_inject": bool,
}
DEEPSPEED_KEYS: Final[dict[str, Any]] = {
    "activation_checkpointing": {
        "partition_activations": bool,
        "number_checkpoints": int,
        "contiguous_memory_optimization": bool,
        "cpu_checkpointing": bool,
        "synchronize_checkpoint_boundary": bool,
        "profile": bool,
    },
    "aio": {
        "block_size": int,
        "queue_depth": int,
        "intra_op_parallelism": int,
        "single_submit": bool,
        "overlap_events": bool,
        "use_gds": bool,
    },
    "autotuning": _AUTOTUNING,
    "comet": {
        "enabled": bool,
        "samples_log_interval": int,
        "project": str,
        "workspace": str,
        "api_key": str,
        "experiment_name": str,
        "experiment_key": str,
        "online": bool,
        "mode": str,
    },
    "comms_logger": {"enabled": bool, "prof_all": bool, "prof_ops": list, "verbose": bool, "debug": bool},
    "csv_monitor": {"enabled": bool, "output_path": PATH, "job_name": str},
    "data_efficiency": {
        "enabled": bool,
        "seed": int,
        "data_sampling": _DATA_SAMPLING,
        "data_routing": {"enabled": bool, "random_ltd": ANY},
    },
    "data_parallel_size": int,
    "dataloader_drop_last": bool,
    "datastates_ckpt": ANY,
    "disable_allgather": bool,
    "disable_python_gc": bool,
    "dump_state": bool,
    "expert_parallel": _EXPERT_PARALLEL,
    "flops_profiler": {
        "enabled": bool,
        "recompute_fwd_factor": float,
        "profile_step": int,
        "module_depth": int,
        "top_modules": int,
        "detailed": bool,
        "output_file": PATH,
    },
    "gradient_allreduce_op": ("mean", "sum"),
    "gradient_predivide_factor": float,
    "hybrid_engine": {
        "enabled": bool,
        "max_out_tokens": int,
        "inference_tp_size": int,
        "release_inference_cache": bool,
        "pin_parameters": bool,
        "tp_gather_partition_size": int,
        "enable_cuda_graph": bool,
    },
    "log_level": ("debug", "info", "warning", "error", "critical"),
    "managed_gradient_accumulation": bool,
    "memory_breakdown": bool,
    "prescale_gradients": bool,
    "seq_parallel_communication_data_type": ("fp16", "bf16", "fp32"),
    "sequence_parallel_size": int,
    "tensor_parallel": _TENSOR_PARALLEL,
    "tensorboard": {"enabled": bool, "output_path": PATH, "job_name": str},
    "timers": {"throughput": {"enabled": bool, "synchronized": bool}},
    "use_data_before_expert_parallelism": bool,
    "vocabulary_size": int,
    "wall_clock_breakdown": bool,
    "wandb": {"enabled": bool, "group": str, "team": str, "project": str},
    "weight_quantization": {
        "enabled": bool,
        "num_bits": int,
        "q_type": ("asymmetric", "symmetric"),
        "q_groups": int,
        "quantized_initialization": ANY,
        "post_init_quant": ANY,
    },
}
# DeepSpeed 0.19 ends with an error where it finds one of these.
REMOVED_DEEPSPEED_KEYS: Final = (
    "nebula", "compression_training", "quantize_training", "sparse_gradients", "eigenvalue", "sparse_attention",
    "elasticity", "graph_harvesting", "curriculum_learning", "progressive_layer_drop",
)  # fmt: skip


def read_table(node: Node, problems: Problems) -> dict[str, Any]:
    """The `deepspeed:` table; keys that DeepSpeed does not know and values of other types go to `problems`."""
    if is_null(node):
        return {}
    if not isinstance(node, Table):
        problems.add(node.place, "deepspeed: expected a table of DeepSpeed's keys; write 'deepspeed={KEY: VALUE}'")
        return {}
    return _read_keys(node, DEEPSPEED_KEYS, "deepspeed", problems)


def _read_keys(table: Table, kinds: dict[str, Any], path: str, problems: Problems) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, node in table.entries.items():
        key = f"{path}.{name}"
        kind = kinds.get(name)
        if path == "deepspeed" and name in OWNED_DEEPSPEED_KEYS:
            values[name] = read_anything(node)  # refused with the key that sets it, in `check_passed_through`
        elif kind is None:
            problems.add(node.place, _explain_unknown(key, name, kinds), key=key)
        elif kind != ANY and is_null(node):
            continue  # DeepSpeed's own default
        elif isinstance(kind, dict) and isinstance(node, Table):
            values[name] = _read_keys(node, kind, key, problems)
        else:
            try:
                values[name] = _read_value(node, kind, key)
            except WrongValueError as error:
                problems.add(node.place, f"{key}: {error}", key=key)
    return values


def _read_value(node: Node, kind: Any, key: str) -> Any:
    if kind == ANY:
        return read_anything(node)
    if kind is list:
        if not isinstance(node, Sequence):
            raise WrongValueError(f"expected a list; write '{key}=[FIRST, SECOND]'")
        return read_anything(node)
    if isinstance(kind, dict):
        raise WrongValueError(f"expected a table; write '{key}={{{next(iter(kind))}: VALUE}}'")
    if isinstance(kind, tuple):
        return read(node, Literal[kind], key)
    return read(node, str if kind == PATH else kind, key, is_path=kind == PATH)


def _explain_unknown(key: str, name: str, kinds: dict[str, Any]) -> str:
    if key == f"deepspeed.{name}" and name in REMOVED_DEEPSPEED_KEYS:
        return f"{key}: was removed from DeepSpeed, which would refuse to start; leave it out"
    names = [*kinds, *(OWNED_DEEPSPEED_KEYS if kinds is DEEPSPEED_KEYS else ())]
    near = difflib.get_close_matches(name[:80], names, n=1)
    if not near:
        return f"{show(key)}: unknown key of DeepSpeed, which would ignore it; leave it out"
    owner = OWNED_DEEPSPEED_KEYS.get(near[0]) if kinds is DEEPSPEED_KEYS else None
    if owner:
        return f"{show(key)}: unknown key of DeepSpeed; {near[0]}, if you mean that, is set by {owner}"
    return (
        f"{show(key)}: unknown key of DeepSpeed, which would ignore it; did you mean {key.removesuffix(name)}{near[0]}?"
    )
