"""Checks for keys that DeepSpeed would refuse late or silently ignore, each with its remedy. Imports no torch."""

from __future__ import annotations

from pydantic import BaseModel

from pretrain.config.deepspeed import STAGES_OF_ZERO_KEYS, grad_accum_dtype, reduce_dtype, zero_stage
from pretrain.config.sections import Fp16Section, OffloadOptimizerSection, OffloadParamSection, RunConfig


def check_zero(config: RunConfig) -> list[str]:
    """Contradictions in `zero`, `fp16` and `optim.implementation`, for any number of processes."""
    return [
        *_check_stage(config),
        *_check_pipeline(config),
        *_check_dtypes(config),
        *_check_offload(config),
        *_check_hierarchy(config),
        *_check_implementation(config),
        *(check_zero_device(config, "cpu", num_nodes=2) if config.run.device == "cpu" else []),
    ]


def check_hierarchy_size(config: RunConfig, dp_size: int) -> list[str]:
    """A second copy of the parameters that the data-parallel ranks cannot share."""
    size = config.zero.zero_hpz_partition_size
    if dp_size % size == 0:
        return []
    nearest = max(divisor for divisor in range(1, min(size, dp_size) + 1) if dp_size % divisor == 0)
    return [
        f"zero.zero_hpz_partition_size ({size}) must divide the data-parallel size ({dp_size}); try "
        f"{nearest}; best is the number of GPUs per node"
    ]


def check_zero_device(config: RunConfig, device_type: str, *, num_nodes: int) -> list[str]:
    """Settings that need a GPU, or more than one node; `device_type` is torch's (cpu, cuda)."""
    zero, problems = config.zero, []
    if device_type == "cpu":
        needs_cuda = {
            "precision=fp16": config.precision == "fp16",
            "precision=fp8": config.precision == "fp8" and not config.fp8.emulate,
            "zero.zero_quantized_weights=true": zero.zero_quantized_weights,
            "zero.zero_quantized_gradients=true": zero.zero_quantized_gradients,
            "zero.offload_optimizer.device=nvme": zero.offload_optimizer.device == "nvme",
            "zero.offload_param.device=nvme": zero.offload_param.device == "nvme",
            "optim.implementation=deepspeed without zero.offload_optimizer": (
                config.optim.implementation == "deepspeed" and zero.offload_optimizer.device == "none"
            ),
        }
        problems += [
            f"{key} needs a CUDA GPU, but this run is on the CPU; take it out" + _INSTEAD.get(key, "")
            for key, is_set in needs_cuda.items()
            if is_set
        ]
    if zero.zero_quantized_gradients and num_nodes == 1:
        problems.append(
            "zero.zero_quantized_gradients quantises traffic between nodes, but all ranks are on one node, where "
            "DeepSpeed ignores it; set it to false"
        )
    return problems


_INSTEAD = {
    "precision=fp16": ", or use precision=bf16 or fp32",
    "precision=fp8": ", use precision=bf16, or set fp8.emulate=true to compute its products in software, slowly",
}


def _check_stage(config: RunConfig) -> list[str]:
    """Keys that the stage does not read, and loss scaling without fp16."""
    zero, stage = config.zero, zero_stage(config)
    problems = [
        f"zero.{key} is read by ZeRO stage {_alternatives(stages)} only, and this run has stage {stage}; "
        f"set zero.stage={stages[-1]}, or leave {key} out"
        for key, stages in STAGES_OF_ZERO_KEYS.items()
        if stage not in stages and _is_changed(zero, key)
    ]
    if config.precision != "fp16" and config.fp16 != Fp16Section():
        problems.append(f"fp16.* scales the loss of precision=fp16, and precision is {config.precision}; leave it out")
    if stage > 0:
        problems += [
            f"deepspeed.{key} is ignored under ZeRO, and this run has stage {stage}; leave it out "
            "(zero.reduce_dtype=fp32 sums gradients without rounding them to 16 bits)"
            for key in ("prescale_gradients", "gradient_predivide_factor")
            if key in config.deepspeed
        ]
    return problems


def _alternatives(stages: tuple[int, ...]) -> str:
    return " or ".join(str(stage) for stage in stages)


def _is_changed(section: BaseModel, key: str) -> bool:
    return bool(getattr(section, key) != type(section).model_fields[key].default)


def _check_pipeline(config: RunConfig) -> list[str]:
    if config.parallel.pipeline > 1 and config.zero.overlap_comm:
        return [
            f"zero.overlap_comm=true with parallel.pipeline ({config.parallel.pipeline}): DeepSpeed's pipelines reduce "
            "after the last micro-batch and would ignore it; leave it out"
        ]
    return []


def _check_dtypes(config: RunConfig) -> list[str]:
    """Combinations of dtypes that DeepSpeed does not support, or supports only at a cost."""
    accum, precision, stage = grad_accum_dtype(config), config.weight_precision, zero_stage(config)
    problems = []
    if accum not in (precision, "fp32"):
        problems.append(f"zero.grad_accum_dtype ({accum}) holds less than precision={precision}; use auto or fp32")
    if precision == "bf16" and accum == "fp32" and stage == 1 and config.zero.offload_optimizer.device == "none":
        problems.append(
            "zero.grad_accum_dtype=fp32 with precision=bf16 and ZeRO stage 1: DeepSpeed switches to an optimizer that "
            "keeps whole fp32 gradients on every rank and ignores buckets and overlap; use zero.stage=2, or "
            "zero.grad_accum_dtype=auto where a pipeline needs stage 1"
        )
    if accum != precision and stage in (1, 2) and config.zero.offload_optimizer.device != "none":
        problems.append(
            f"zero.grad_accum_dtype ({accum}) with zero.offload_optimizer in ZeRO stage {stage}: DeepSpeed sums "
            f"there in precision={precision} all the same; use auto, or zero.stage=3"
        )
    if {reduce_dtype(config), precision} == {"bf16", "fp16"}:
        problems.append(f"zero.reduce_dtype ({reduce_dtype(config)}) does not go with precision={precision}; use fp32")
    return problems


def _check_offload(config: RunConfig) -> list[str]:
    zero, stage = config.zero, zero_stage(config)
    optimizer, problems = zero.offload_optimizer, []
    for name, section in (("offload_optimizer", optimizer), ("offload_param", zero.offload_param)):
        problems += _check_offload_device(f"zero.{name}", section)
    if optimizer.device == "nvme" and stage in (1, 2):
        problems.append(
            f"zero.offload_optimizer.device=nvme is read by ZeRO stage 3 only (stage {stage} would take cpu without a "
            "word); set zero.stage=3, or zero.offload_optimizer.device=cpu"
        )
    if optimizer.ratio < 1 and (stage != 3 or config.optim.implementation != "deepspeed"):
        problems.append(
            f"zero.offload_optimizer.ratio ({optimizer.ratio}) below 1 needs zero.stage=3 (found {stage}) and "
            f"optim.implementation=deepspeed (found {config.optim.implementation}); set both, or ratio=1"
        )
    if optimizer.device != "none" and stage in (1, 2) and not zero.contiguous_gradients:
        problems.append(
            "zero.contiguous_gradients=false with zero.offload_optimizer: DeepSpeed keeps gradients contiguous there "
            "and would ignore it; leave it out"
        )
    return problems


def _check_offload_device(name: str, section: OffloadOptimizerSection | OffloadParamSection) -> list[str]:
    """A device without its folder, and keys that it does not read."""
    if section.device == "nvme":
        problem = f"{name}.device=nvme needs {name}.nvme_path: a folder on the NVMe disk of each node"
        return [problem] if section.nvme_path is None else []
    keys_read = {"device"} if section.device == "none" else {"device", "pin_memory", "ratio"}
    return [
        f"{name}.{key} is not read with {name}.device={section.device}; change the device, or leave it out"
        for key in type(section).model_fields
        if key not in keys_read and _is_changed(section, key)
    ]


def _check_hierarchy(config: RunConfig) -> list[str]:
    if config.zero.zero_hpz_partition_size > 1 and config.parallel.tensor > 1:
        return [
            f"zero.zero_hpz_partition_size ({config.zero.zero_hpz_partition_size}) with parallel.tensor "
            f"({config.parallel.tensor}): DeepSpeed would share parameters between ranks that hold different parts; "
            "use one of them"
        ]
    return []


def _check_implementation(config: RunConfig) -> list[str]:
    if config.optim.implementation == "deepspeed" and config.optim.name != "adamw":
        return [
            f"optim.implementation=deepspeed with optim.name={config.optim.name}: DeepSpeed's LAMB takes ZeRO's slices "
            "for layers; use optim.implementation=torch"
        ]
    return []
