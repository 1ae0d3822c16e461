"""Checks of a configuration: every contradiction, with its arithmetic and the nearest value that works.

`check_config` needs only the configuration, `check_world_size` also the number of started processes. Neither imports
torch, so a mistake is reported within the first second, before any process waits for another.
"""

from __future__ import annotations

from pretrain.config.compile_checks import check_compile
from pretrain.config.deepspeed import check_passed_through
from pretrain.config.sections import DataSection, RunConfig, SplitsSection, TrainSection, WatchdogSection
from pretrain.config.zero_checks import check_hierarchy_size, check_zero
from pretrain.errors import counted

_FP8_MULTIPLE = 16


def check_config(config: RunConfig, world_size: int | None = None) -> list[str]:
    """Every contradiction in a configuration; with `world_size`, also those with the number of started processes."""
    model, train, data, optim = config.model, config.train, config.data, config.optim
    problems = []
    if model.hidden_size % model.num_attention_heads:
        nearest = _nearest_divisor(model.hidden_size, model.num_attention_heads)
        problems.append(
            f"model.hidden_size ({model.hidden_size}) must be a multiple of model.num_attention_heads "
            f"({model.num_attention_heads}); try {nearest} heads"
        )
    if data.seq_length > model.max_position_embeddings:
        problems.append(
            f"data.seq_length ({data.seq_length}) is longer than model.max_position_embeddings "
            f"({model.max_position_embeddings}); raise the latter to {data.seq_length}"
        )
    if config.is_contrastive and train.micro_batch_size < 2:
        problems.append(
            f"train.micro_batch_size ({train.micro_batch_size}) must be at least 2: the contrastive loss draws its "
            "negatives from the other rows of the micro-batch; raise it, or set objective.contrastive_weight=0"
        )
    problems += _check_recompute(train)
    if world_size is None and train.global_batch_size % train.micro_batch_size:
        problems.append(_batch_arithmetic(train, dp_size=1))
    if optim.warmup_steps >= train.steps:
        problems.append(
            f"optim.warmup_steps ({optim.warmup_steps}) must be smaller than train.steps ({train.steps}); "
            f"try optim.warmup_steps={train.steps // 10}"
        )
    if optim.decay_steps is not None and optim.schedule != "wsd":
        problems.append(f"optim.decay_steps ({optim.decay_steps}) belongs to optim.schedule=wsd, not {optim.schedule}")
    if optim.schedule == "wsd" and optim.warmup_steps + (optim.decay_steps or 0) > train.steps:
        problems.append(
            f"optim.warmup_steps ({optim.warmup_steps}) + optim.decay_steps ({optim.decay_steps}) exceed "
            f"train.steps ({train.steps}); shorten one of them"
        )
    if not all(0.0 <= beta < 1.0 for beta in optim.betas):
        problems.append(f"optim.betas ({list(optim.betas)}) must lie in [0, 1), for example [0.9, 0.999]")
    problems += _check_data(data) + _check_watchdog(config.watchdog) + _check_spike(config)
    problems += _check_fp8(config) + check_passed_through(config) + check_zero(config) + check_compile(config)
    return problems + _check_layout(config, world_size)


def _check_recompute(train: TrainSection) -> list[str]:
    wanted, older = train.recompute, train.recompute_layers
    if wanted is None:
        return []
    number = wanted.removeprefix("layers:")
    if wanted not in ("none", "elementwise", "layers:all") and not (wanted != number and number.isdecimal()):
        return [f"train.recompute ({wanted}) must be none, elementwise, layers:all or layers:N, for example layers:4"]
    if older != 0 and wanted != f"layers:{older}":
        return [
            f"train.recompute ({wanted}) and its older name train.recompute_layers ({older}) contradict each other; "
            "set train.recompute_layers=0"
        ]
    return []


def _check_fp8(config: RunConfig) -> list[str]:
    """What FP8 products cannot do; whether the GPU has them is seen when the model is built."""
    if config.precision != "fp8":
        emulate = "fp8.emulate=true emulates the products of precision=fp8"
        return [f"{emulate}, and precision is {config.precision}; leave it out"] if config.fp8.emulate else []
    model, problems = config.model, []
    if config.parallel.tensor > 1:
        problems.append(
            f"precision=fp8 with parallel.tensor ({config.parallel.tensor}): tensor-parallel linears have no FP8 "
            "products; set parallel.tensor=1, or precision=bf16"
        )
    problems += [
        f"precision=fp8: model.{key} ({size}) must be a multiple of {_FP8_MULTIPLE}, as FP8 products need; try "
        f"model.{key}={-(-size // _FP8_MULTIPLE) * _FP8_MULTIPLE}, or precision=bf16"
        for key, size in (("hidden_size", model.hidden_size), ("ffn_hidden_size", model.ffn_hidden_size))
        if size % _FP8_MULTIPLE
    ]
    if config.run.device == "cuda" and config.fp8.emulate:
        problems.append("fp8.emulate=true is for a CPU, and run.device is cuda; leave it out")
    return problems


def check_world_size(config: RunConfig, world_size: int) -> list[str]:
    """Every contradiction between the configuration and the number of started processes."""
    parallel, train = config.parallel, config.train
    model_parallel = parallel.tensor * parallel.pipeline
    grid = f"parallel.tensor ({parallel.tensor}) x parallel.pipeline ({parallel.pipeline})"
    problems = []
    dp_size = parallel.data or max(1, world_size // model_parallel)
    if parallel.data is not None and parallel.data * model_parallel != world_size:
        num_processes = parallel.data * model_parallel
        problems.append(
            f"{grid} x parallel.data ({parallel.data}) = {counted(num_processes, 'process', 'processes')}, but "
            f"{world_size} {'was' if world_size == 1 else 'were'} started; start "
            f"`taco train --processes {num_processes} ...` (or torchrun --nproc-per-node {num_processes}) or set "
            f"parallel.data={max(1, world_size // model_parallel)}"
        )
    elif world_size % model_parallel:
        problems.append(f"{grid} = {model_parallel} does not divide the number of started processes ({world_size})")
    if train.global_batch_size % (train.micro_batch_size * dp_size):
        problems.append(_batch_arithmetic(train, dp_size))
    return problems + check_hierarchy_size(config, dp_size)


def legal_layouts(config: RunConfig, world_size: int) -> list[tuple[int, int, int]]:
    """Every (tensor, pipeline, data) layout of `world_size` processes that works with the rest of `config`.

    The layouts nearest to the configured sizes come first.
    """
    configured = config.parallel
    layouts = []
    for tensor in _divisors(world_size):
        for pipeline in _divisors(world_size // tensor):
            data = world_size // tensor // pipeline
            sizes = {"tensor": tensor, "pipeline": pipeline, "data": data}
            candidate = config.model_copy(update={"parallel": configured.model_copy(update=sizes)})
            if not _check_grid(candidate) + check_world_size(candidate, world_size):
                layouts.append((tensor, pipeline, data))
    return sorted(
        layouts, key=lambda sizes: (abs(sizes[0] - configured.tensor) + abs(sizes[1] - configured.pipeline), sizes)
    )


def _check_layout(config: RunConfig, world_size: int | None) -> list[str]:
    problems = _check_grid(config)
    if world_size is None:
        return problems
    problems += check_world_size(config, world_size)
    if problems:
        problems[-1] += f"; {_describe_layouts(config, world_size)}"
    return problems


def _check_grid(config: RunConfig) -> list[str]:
    return _check_tensor_parallel(config) + _check_pipeline(config)


def _describe_layouts(config: RunConfig, world_size: int) -> str:
    """The layouts to choose from, or else the nearest number of processes that has one."""
    started = counted(world_size, "process", "processes")
    layouts = legal_layouts(config, world_size)
    if layouts:
        shown = ", ".join(str(layout) for layout in layouts[:6])
        return f"(parallel.tensor, parallel.pipeline, parallel.data) that fit {started}: {shown}"
    others = sorted(range(1, 2 * world_size + 1), key=lambda number: abs(number - world_size))[:64]
    nearest = next((number for number in others if legal_layouts(config, number)), None)
    if nearest is None:
        return f"no layout fits {started} until that is changed"
    layout = legal_layouts(config, nearest)[0]
    return f"no layout fits {started}; the nearest number that one fits is {nearest}: {layout}"


def check_splits(splits: SplitsSection) -> list[str]:
    """Shares that do not add up to 1."""
    total = splits.train + splits.validation + splits.test
    if abs(total - 1) <= 1e-9:
        return []
    return [
        f"data.splits: train ({splits.train}) + validation ({splits.validation}) + test ({splits.test}) must be 1, "
        f"found {total:.12g}; try train={splits.train + 1 - total:.12g}"
    ]


def _check_data(data: DataSection) -> list[str]:
    """Weights and splits that contradict the datasets or each other."""
    problems = []
    if data.weights is not None and len(data.weights) != len(data.train):
        problems.append(
            f"data.weights has {counted(len(data.weights), 'entry', 'entries')} for "
            f"{counted(len(data.train), 'dataset')} of data.train; give one each"
        )
    weights, smallest = data.weights or (), 2.0**-20
    for weight in weights:
        if weight <= 0 or weight / sum(weights) < smallest:
            problems.append(
                f"data.weights: {weight} must be positive and at least 2^-20 of their sum; leave out unwanted datasets"
            )
    if data.splits is not None:
        problems += check_splits(data.splits)
        if data.validation:
            problems.append(
                "data.splits takes the validation rows from data.train, so data.validation must be empty; set "
                "'data.validation=[]' or leave data.splits out"
            )
    return problems


def _check_spike(config: RunConfig) -> list[str]:
    checkpoint = config.checkpoint
    ways_to_save = (checkpoint.every_steps, checkpoint.every_minutes, checkpoint.hours_between_failures)
    if config.spike.policy != "rollback" or any(way is not None for way in ways_to_save):
        return []
    return [
        "spike.policy=rollback returns to the last checkpoint, but none is saved before the end; set "
        "checkpoint.every_steps, or spike.policy=warn"
    ]


def _check_watchdog(watchdog: WatchdogSection) -> list[str]:
    """Time-outs that are not below that of the process group."""
    names = ("start_seconds", "step_seconds", "evaluation_seconds", "checkpoint_seconds")
    return [
        f"watchdog.{name} ({seconds:g}) must be below watchdog.collective_seconds ({watchdog.collective_seconds:g}), "
        f"which would end the run first and explain less; raise the latter to {2 * seconds:g}"
        for name in names
        if watchdog.enabled and (seconds := getattr(watchdog, name)) and seconds >= watchdog.collective_seconds
    ]


def _check_tensor_parallel(config: RunConfig) -> list[str]:
    """Sizes that the tensor-parallel ranks cannot split, each with the nearest size that they can."""
    tensor, model = config.parallel.tensor, config.model
    parts = {"model.num_attention_heads": model.num_attention_heads, "model.ffn_hidden_size": model.ffn_hidden_size}
    if config.parallel.sequence:
        parts["train.micro_batch_size x data.seq_length"] = config.train.micro_batch_size * config.data.seq_length
    problems = [
        f"{name} ({size}) must be a multiple of parallel.tensor ({tensor}); "
        f"try parallel.tensor={_nearest_divisor(size, tensor)} or {-(-size // tensor) * tensor}"
        for name, size in parts.items()
        if size % tensor
    ]
    if config.parallel.sequence and tensor == 1:
        problems.append(
            "parallel.sequence splits the tokens over the tensor-parallel ranks, but parallel.tensor is 1; "
            "set parallel.tensor=2 or more, or parallel.sequence=false"
        )
    return problems


def _check_pipeline(config: RunConfig) -> list[str]:
    """Pipeline settings that cannot work, each with the nearest one that can."""
    pipeline, stage_layers, num_layers = (
        config.parallel.pipeline,
        config.parallel.stage_layers,
        config.model.num_layers,
    )
    problems = []
    if pipeline > num_layers:
        problems.append(
            f"parallel.pipeline ({pipeline}) must not exceed model.num_layers ({num_layers}): every stage needs an "
            f"encoder layer; try parallel.pipeline={num_layers}"
        )
    if pipeline > 1 and config.zero.stage > 1:
        problems.append(
            f"zero.stage ({config.zero.stage}) with parallel.pipeline ({pipeline}): DeepSpeed's pipelines support "
            "ZeRO-1 at most, since higher stages would reduce gradients at every micro-batch; use zero.stage=1, or "
            "parallel.pipeline=1 with parallel.tensor"
        )
    if stage_layers is not None and (
        len(stage_layers) != pipeline or sum(stage_layers) != num_layers or min(stage_layers) < 1
    ):
        problems.append(
            f"parallel.stage_layers ({list(stage_layers)}) must be {counted(pipeline, 'number')} (parallel.pipeline) "
            f"of at least 1 with the sum {num_layers} (model.num_layers); leave it empty to distribute layers by cost"
        )
    return problems


def _batch_arithmetic(train: TrainSection, dp_size: int) -> str:
    unit = train.micro_batch_size * dp_size
    nearest = max(unit, round(train.global_batch_size / unit) * unit)
    return (
        f"train.global_batch_size ({train.global_batch_size}) must be a multiple of train.micro_batch_size "
        f"({train.micro_batch_size}) x data-parallel size ({dp_size}) = {unit}; try {nearest}"
    )


def _nearest_divisor(number: int, target: int) -> int:
    return min(_divisors(number), key=lambda d: (abs(d - target), d))


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
