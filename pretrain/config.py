"""The typed tree that says what a run is: one YAML file, `section.key=value` overrides, every mistake told at once.

Torch-free, so that `--help`, `--dry-run` and a configuration error answer at once. What can be computed is a property
or a function here, never a second field.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pretrain.errors import ConfigError

RowMode = Literal["stream", "document", "pack", "sentence"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class RunSection(_Section):
    """Where the run lives and what makes it repeatable."""

    output_dir: Path = Field(description="folder of this run: configuration, metrics, logs, checkpoints")
    seed: int = Field(1234, ge=0, lt=2**63, description="data order, masks, TACO pairs, dropout and initial weights")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA where there is one, else CPU")
    tensorboard: bool = Field(True, description="also write TensorBoard events beside metrics.jsonl")
    init_from: Path | None = Field(None, description="start from the weights of this checkpoint (taco import-hf)")


class SplitsSection(_Section):
    """Shares of the documents of data.train, told apart by a hash of their tokens; together 1."""

    train: float = Field(gt=0.0, le=1.0)
    validation: float = Field(0.0, ge=0.0, lt=1.0)
    test: float = Field(0.0, ge=0.0, lt=1.0, description="kept out of training and validation")


class DataSection(_Section):
    """Which datasets, and how their documents become rows of seq_length tokens."""

    train: tuple[str, ...] = Field(min_length=1, description="dataset prefixes (PREFIX.bin/.idx/.json)")
    validation: tuple[str, ...] = Field((), description="dataset prefixes of the validation split")
    weights: tuple[float, ...] | None = Field(None, description="share of each dataset of data.train; empty: every row")
    splits: SplitsSection | None = Field(None, description="cut data.train into train, validation and test")
    row_mode: RowMode = Field("stream", description="how documents become rows: see docs/data-index.md")
    seq_length: int = Field(512, ge=8, description="tokens per row, [CLS] and [SEP] included")
    prefetch: int = Field(2, ge=0, description="micro-batches prepared ahead in a thread")
    index_cache: Path | None = Field(None, description="folder for index tables where PREFIX.index cannot be written")


class ModelSection(_Section):
    """The post-LN BERT encoder; the vocabulary size comes from the data."""

    num_layers: int = Field(12, ge=1)
    hidden_size: int = Field(768, ge=1)
    num_attention_heads: int = Field(12, ge=1)
    ffn_hidden_size: int = Field(3072, ge=1)
    hidden_dropout: float = Field(0.1, ge=0.0, lt=1.0)
    attention_dropout: float = Field(0.1, ge=0.0, lt=1.0)
    max_position_embeddings: int = Field(512, ge=8)
    type_vocab_size: int = Field(2, ge=1)
    layer_norm_eps: float = Field(1e-12, gt=0.0)
    initializer_range: float = Field(0.02, gt=0.0)

    @property
    def head_size(self) -> int:
        """Features of one attention head."""
        return self.hidden_size // self.num_attention_heads


class ObjectiveSection(_Section):
    """Masked language modelling plus the token-level contrastive loss on global semantics."""

    contrastive_weight: float = Field(1.0, ge=0.0, description="0 trains plain masked language modelling")
    temperature: float = Field(0.07, gt=0.0)
    num_negatives: int = Field(50, ge=1, description="tokens of other rows per anchor, with replacement")
    positive_window: int = Field(2, ge=1, description="offsets -w..-1, 1..w; the authors' full width 5 is w = 2")
    anchors: Literal["all", "masked", "unmasked"] = "all"
    exclude_special: bool = Field(False, description="special tokens are never anchor, positive or negative")
    mask_rate: float = Field(0.15, gt=0.0, le=1.0, description="share of the non-special tokens to predict")
    masking: Literal["token", "whole_word", "span"] = "token"
    mean_span_length: float = Field(3.0, ge=1.0, le=64.0, description="mean of the geometric span length, tokens")


class TrainSection(_Section):
    """How long, in which batches, and how often the run reports."""

    steps: int = Field(100_000, ge=1)
    micro_batch_size: int = Field(8, ge=1, description="rows per forward pass and data-parallel rank")
    global_batch_size: int = Field(256, ge=1, description="rows per optimizer step, over all ranks")
    log_every: int = Field(10, ge=1)
    eval_every: int = Field(1000, ge=1)
    recompute_layers: int | Literal["all"] = Field(
        0, description="encoder layers, from the first on, that are computed again in backward to save memory"
    )
    eval_batches: int = Field(32, ge=1, description="micro-batches of the validation split per evaluation, all ranks")


class OptimSection(_Section):
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "lamb"] = "adamw"
    lr: float = Field(1e-4, gt=0.0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0.0)
    weight_decay: float = Field(0.01, ge=0.0, description="not applied to biases and LayerNorm")
    schedule: Literal["linear", "cosine", "wsd"] = "linear"
    warmup_steps: int = Field(10_000, ge=0)
    decay_steps: int | None = Field(None, ge=1, description="wsd only: length of the final decay; default steps // 10")
    min_lr_ratio: float = Field(0.0, ge=0.0, le=1.0, description="what the decay tends to after the last step, over lr")
    clip_grad_norm: float = Field(1.0, ge=0.0, description="0 turns clipping off")


class ParallelSection(_Section):
    """Sizes of the process grid."""

    tensor: int = Field(1, ge=1)
    pipeline: int = Field(1, ge=1)
    sequence: bool = Field(False, description="split the tokens over the tensor-parallel ranks too")
    stage_layers: tuple[int, ...] | None = Field(
        None, description="encoder layers of each pipeline stage; empty: dealt out by modelled cost"
    )
    data: int | None = Field(None, ge=1, description="data-parallel ranks; empty: whatever was started")


class ZeroSection(_Section):
    """DeepSpeed ZeRO."""

    stage: Literal[0, 1, 2, 3] = 1
    reduce_bucket_size: int = Field(200_000_000, ge=1, description="elements per gradient bucket")
    allgather_bucket_size: int = Field(200_000_000, ge=1, description="elements per parameter bucket (stages 1 and 2)")
    overlap_comm: bool = Field(True, description="reduce gradients while backward runs (CUDA)")


class CheckpointSection(_Section):
    """When to save and what to keep."""

    every_steps: int | None = Field(1000, ge=1)
    every_minutes: float | None = Field(None, gt=0.0)
    keep: int = Field(3, ge=1, description="newest good checkpoints that stay")


class RunConfig(_Section):
    """Everything that describes one run."""

    run: RunSection
    data: DataSection
    model: ModelSection = ModelSection()
    objective: ObjectiveSection = ObjectiveSection()
    train: TrainSection = TrainSection()
    optim: OptimSection = OptimSection()
    parallel: ParallelSection = ParallelSection()
    zero: ZeroSection = ZeroSection()
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    checkpoint: CheckpointSection = CheckpointSection()
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="passed through to DeepSpeed's configuration")

    @property
    def recompute_layers(self) -> int:
        """How many encoder layers are computed again in backward."""
        wanted = self.train.recompute_layers
        return self.model.num_layers if wanted == "all" else min(wanted, self.model.num_layers)

    @property
    def is_contrastive(self) -> bool:
        """True when the TACO loss takes part."""
        return self.objective.contrastive_weight > 0

    def grad_accum_steps(self, dp_size: int) -> int:
        """Micro-steps per optimizer step on `dp_size` data-parallel ranks."""
        return self.train.global_batch_size // (self.train.micro_batch_size * dp_size)


# -- loading -----------------------------------------------------------------------------------------------------------


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of `path` with `section.key=value` overrides applied.

    A top-level key `extends: other.yaml` (relative to the file) names a file whose values this one changes.

    Raises:
        ConfigError: file, key, value and remedy of every problem found, together.
    """
    return resolve_config(path, _read_tree(path, seen=()), overrides)


def resolve_config(path: Path, tree: dict[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration that a nested dictionary means, as `load_config`; `path` is what errors call it."""
    for override in overrides:
        _apply_override(tree, override)
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(path, error)) from None
    problems = check_config(config)
    if problems:
        raise ConfigError(_join(path, problems))
    return config


def dump_config(config: RunConfig) -> str:
    """The resolved tree as YAML; `load_config` of it gives the same tree."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_tree(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `extends` goes round in a circle: {' -> '.join(str(p) for p in seen)}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file; configs/ holds examples") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections (run:, data:, ...) at the top level, found {type(tree).__name__}")
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends must be a file name, found {base!r}")
    return _merge(_read_tree(path.parent / base, (*seen, path.resolve())), tree)


def _merge(base: dict[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        both_tables = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both_tables else value
    return merged


def _apply_override(tree: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r}: expected section.key=value, for example optim.lr=1e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from None
    table = tree
    for key in keys[:-1]:
        child = table.get(key)
        # A fresh dict each time: the tree may share tables with the file it extends.
        table[key] = dict(child) if isinstance(child, dict) else {}
        table = table[key]
    table[keys[-1]] = value


# -- explaining --------------------------------------------------------------------------------------------------------


def _join(path: Path, problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return f"{path}: {problems[0]}"
    return f"{path}: {len(problems)} problems\n" + "\n".join(f"  - {problem}" for problem in problems)


def _explain(path: Path, error: ValidationError) -> str:
    return _join(path, [_explain_one(item["loc"], item["type"], item["msg"], item["input"]) for item in error.errors()])


def _explain_one(loc: tuple[int | str, ...], kind: str, message: str, value: object) -> str:
    key = ".".join(str(part) for part in loc)
    if kind == "extra_forbidden":
        return f"{key}: unknown key{_did_you_mean(loc)}"
    if kind == "missing":
        return f"{key}: is required; set it in the file or as {key}=VALUE"
    if kind == "tuple_type":
        return f"{key}: expected a list, found {value!r}; write {key}=[{value}]"
    return f"{key}: {message[0].lower() + message[1:]}, found {value!r}"


def _did_you_mean(loc: tuple[int | str, ...]) -> str:
    """A hint for an unknown key: a near name in its section, or the section that has it."""
    section: type[BaseModel] = RunConfig
    for part in loc[:-1]:
        section = _section_type(section, str(part))
    name = str(loc[-1])
    near = difflib.get_close_matches(name, section.model_fields, n=1)
    if near:
        return f"; did you mean {'.'.join([*map(str, loc[:-1]), near[0]])}?"
    everywhere = {
        f"{outer}.{inner}": inner
        for outer in RunConfig.model_fields
        if (kind := _section_type(RunConfig, outer)) is not RunConfig
        for inner in kind.model_fields
    }
    homes = [full for full, inner in everywhere.items() if inner == name]
    if homes:
        return f"; did you mean {homes[0]}?"
    return f"; known keys here: {', '.join(section.model_fields)}"


def _section_type(parent: type[BaseModel], name: str) -> type[BaseModel]:
    field = parent.model_fields.get(name)
    annotation = field.annotation if field else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else parent


# -- what does not fit together ----------------------------------------------------------------------------------------


def check_config(config: RunConfig) -> list[str]:
    """Every contradiction that can be seen without knowing how many processes there are."""
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
    if train.global_batch_size % train.micro_batch_size:
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
    problems += _check_data(data)
    problems += _check_tensor_parallel(config)
    problems += _check_pipeline(config)
    return problems


def check_world_size(config: RunConfig, world_size: int) -> list[str]:
    """Every contradiction between the configuration and the number of started processes."""
    parallel, train = config.parallel, config.train
    model_parallel = parallel.tensor * parallel.pipeline
    grid = f"parallel.tensor ({parallel.tensor}) x parallel.pipeline ({parallel.pipeline})"
    if parallel.data is not None and parallel.data * model_parallel != world_size:
        wanted = parallel.data * model_parallel
        return [
            f"{grid} x parallel.data ({parallel.data}) = {wanted} processes, but {world_size} "
            f"{'was' if world_size == 1 else 'were'} started; start `torchrun --nproc-per-node {wanted} "
            f"-m pretrain.train ...` or set parallel.data={max(1, world_size // model_parallel)}"
        ]
    if world_size % model_parallel:
        return [f"{grid} = {model_parallel} does not divide the {world_size} started processes"]
    dp_size = world_size // model_parallel
    if train.global_batch_size % (train.micro_batch_size * dp_size):
        return [_batch_arithmetic(train, dp_size)]
    return []


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
    """Weights and splits that do not say what to do."""
    problems = []
    if data.weights is not None and len(data.weights) != len(data.train):
        problems.append(
            f"data.weights has {len(data.weights)} entries for {len(data.train)} datasets of data.train; give one each"
        )
    weights, smallest = data.weights or (), 2.0**-20
    for weight in weights:
        if weight <= 0 or weight / sum(weights) < smallest:
            problems.append(
                f"data.weights: {weight} must be positive and at least 2^-20 of their sum; leave out what is not wanted"
            )
    if data.splits is not None:
        problems += check_splits(data.splits)
        if data.validation:
            problems.append(
                "data.splits makes the validation rows out of data.train, so data.validation must be empty; set "
                "data.validation=[] or leave data.splits out"
            )
    return problems


def _check_tensor_parallel(config: RunConfig) -> list[str]:
    """What cannot be split over the tensor-parallel ranks, each with the nearest size that can."""
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
            "parallel.sequence splits the tokens over the tensor-parallel ranks, and parallel.tensor is 1; "
            "set parallel.tensor=2 or more, or parallel.sequence=false"
        )
    return problems


def _check_pipeline(config: RunConfig) -> list[str]:
    """What a pipeline cannot be, with the nearest one that can."""
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
            f"zero.stage ({config.zero.stage}) with parallel.pipeline ({pipeline}): DeepSpeed's pipelines go with "
            "ZeRO-1 at most, since later stages would reduce gradients at every micro-batch; use zero.stage=1, or "
            "parallel.pipeline=1 with parallel.tensor"
        )
    if stage_layers is not None and (
        len(stage_layers) != pipeline or sum(stage_layers) != num_layers or min(stage_layers) < 1
    ):
        problems.append(
            f"parallel.stage_layers ({list(stage_layers)}) must be {pipeline} numbers (parallel.pipeline) of at least "
            f"1 with the sum {num_layers} (model.num_layers); leave it empty to have them dealt out by cost"
        )
    return problems


def _batch_arithmetic(train: TrainSection, dp_size: int) -> str:
    unit = train.micro_batch_size * dp_size
    nearest = max(unit, round(train.global_batch_size / unit) * unit)
    return (
        f"train.global_batch_size ({train.global_batch_size}) must be a multiple of train.micro_batch_size "
        f"({train.micro_batch_size}) x data-parallel size ({dp_size}) = {unit}; try {nearest}"
    )


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(d - wanted), d))
