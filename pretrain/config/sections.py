"""The typed tree that says what a run is.

Imports no torch, so `--help`, `--dry-run` and configuration errors answer at once. A value that can be computed is a
property here, never a second field.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from pretrain.config.dataset_names import prefix_of

RowMode = Literal["stream", "document", "pack", "sentence"]

IS_PATH: Final = "path"  # marks text in which `~` and variables are expanded when a configuration is read
Prefix = Annotated[str, IS_PATH]


@dataclass(frozen=True)
class Switch:
    """Marks options of which two are also what true and false mean: the key was a switch once."""

    on: str
    off: str

    def option(self, value: Any) -> Any:
        """The option that a truth value means; anything else as it is."""
        return (self.on if value else self.off) if isinstance(value, bool) else value


_COMPILE_SWITCH = Switch(on="layers", off="off")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class RunSection(_Section):
    """The folder of the run, and what makes it repeatable."""

    output_dir: Path = Field(description="folder of this run: configuration, metrics, logs, checkpoints")
    seed: int = Field(1234, ge=0, lt=2**63, description="data order, masks, TACO pairs, dropout and initial weights")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA if there is a GPU, else CPU")
    tensorboard: bool = Field(True, description="also write TensorBoard events beside metrics.jsonl")
    init_from: Path | None = Field(
        None, description="start from the weights of this checkpoint (of another run, or from taco import-hf)"
    )


class SplitsSection(_Section):
    """Shares of the documents of data.train, assigned by a hash of their tokens; they add up to 1."""

    train: float = Field(gt=0.0, le=1.0)
    validation: float = Field(0.0, ge=0.0, lt=1.0)
    test: float = Field(0.0, ge=0.0, lt=1.0, description="kept out of training and validation")


class DataSection(_Section):
    """Which datasets, and how their documents become rows of seq_length tokens."""

    train: tuple[Prefix, ...] = Field(min_length=1, description="dataset prefixes (PREFIX.bin/.idx/.json)")
    validation: tuple[Prefix, ...] = Field((), description="dataset prefixes of the validation split")
    weights: tuple[float, ...] | None = Field(None, description="share of each dataset of data.train; empty: every row")
    splits: SplitsSection | None = Field(None, description="split data.train into train, validation and test")
    row_mode: RowMode = Field("stream", description="how documents become rows: see docs/data-index.md")
    seq_length: int = Field(512, ge=8, description="tokens per row, [CLS] and [SEP] included")
    prefetch: int = Field(2, ge=0, description="micro-batches that a thread prepares ahead")
    index_cache: Path | None = Field(None, description="folder for index tables if PREFIX.index cannot be written")

    @field_validator("train", "validation")
    @classmethod
    def _as_prefixes(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(prefix_of, names))

    @property
    def tokenizer_folder(self) -> Path:
        """The tokenizer beside the first dataset, which all datasets of a run share."""
        return Path(f"{self.train[0]}.tokenizer")


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


class MlmSection(_Section):
    """How the masked-language-modelling losses of an optimizer step are averaged."""

    average: Literal["token", "micro_batch"] = Field(
        "token", description="token: over all masked tokens of the step; micro_batch: over the micro-batches' means"
    )


class TrainSection(_Section):
    """The length of the run, its batches, and how often it reports."""

    steps: int = Field(100_000, ge=1)
    micro_batch_size: int = Field(8, ge=1, description="rows per forward pass and data-parallel rank")
    global_batch_size: int = Field(256, ge=1, description="rows per optimizer step, over all ranks")
    log_every: int = Field(10, ge=1)
    eval_every: int = Field(1000, ge=1)
    recompute: Literal["none", "elementwise"] | str | None = Field(
        None,
        description="what is computed again in backward to save memory: none; elementwise (GELU); layers:N (encoder "
        "layers, from the first on); layers:all; empty: what recompute_layers says",
    )
    recompute_layers: int | Literal["all"] = Field(0, description="older name of recompute=layers:N")
    max_bad_steps: int = Field(
        10,
        ge=1,
        description="skipped steps in a row, each with a non-finite loss or gradient, that end the run",
    )
    compile: Annotated[
        Literal["off", "layers", "full", "auto"], _COMPILE_SWITCH, BeforeValidator(_COMPILE_SWITCH.option)
    ] = Field(
        "off",
        description="torch.compile; layers: one graph for all encoder layers, also written true; full: from embedding "
        "to logits; auto: layers on a GPU",
    )
    cuda_graphs: bool = Field(
        False, description="replay the encoder's forward and backward as CUDA graphs where rows have one shape"
    )
    kernels: Literal["auto", "triton", "torch"] = Field(
        "auto", description="implementation of the step's own kernels; auto: Triton on a GPU where it is installed"
    )
    attention: Literal["auto", "torch", "varlen", "triton", "flash_attn"] = Field(
        "auto", description="implementation of attention; auto: the fastest that can do what the run needs"
    )
    deterministic: bool = Field(
        False,
        description="on a GPU: only kernels that repeat bit for bit, even if slower (a CPU always does)",
    )
    eval_batches: int = Field(32, ge=1, description="validation micro-batches per evaluation, over all ranks")
    replica_check_every: int | None = Field(
        100,
        ge=1,
        description="steps between comparisons of the ranks' copies of weights, also made before a save; empty: never",
    )


class OptimSection(_Section):
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "lamb"] = "adamw"
    implementation: Literal["torch", "deepspeed"] = Field(
        "torch", description="AdamW: torch's fused kernel, or DeepSpeed's FusedAdam (offloaded: DeepSpeedCPUAdam)"
    )
    lr: float = Field(1e-4, gt=0.0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0.0)
    weight_decay: float = Field(0.01, ge=0.0, description="not applied to biases and LayerNorm")
    schedule: Literal["linear", "cosine", "wsd"] = "linear"
    warmup_steps: int = Field(10_000, ge=0)
    decay_steps: int | None = Field(None, ge=1, description="wsd only: length of the final decay; default steps // 10")
    min_lr_ratio: float = Field(0.0, ge=0.0, le=1.0, description="end of the decay, after the last step, over lr")
    clip_grad_norm: float = Field(1.0, ge=0.0, description="0 turns clipping off")


class ParallelSection(_Section):
    """Sizes of the process grid."""

    tensor: int = Field(1, ge=1)
    pipeline: int = Field(1, ge=1)
    sequence: bool = Field(False, description="also split the tokens over the tensor-parallel ranks")
    stage_layers: tuple[int, ...] | None = Field(
        None, description="encoder layers of each pipeline stage; empty: distributed by modelled cost"
    )
    data: int | None = Field(None, ge=1, description="data-parallel ranks; empty: as many as were started")


class OffloadOptimizerSection(_Section):
    """Where optimizer state and fp32 master weights live, and where they are updated (ZeRO-1 to 3)."""

    device: Literal["none", "cpu", "nvme"] = Field("none", description="nvme: ZeRO-3 only; both update on the CPU")
    pin_memory: bool = Field(True, description="page-locked memory: faster copies, never swapped out")
    ratio: float = Field(1.0, gt=0.0, le=1.0, description="ZeRO-3: share that is offloaded")
    nvme_path: Path | None = Field(None, description="folder on the local NVMe disk")
    buffer_count: int = Field(4, ge=4, description="nvme: buffers, four per parameter with Adam")


class OffloadParamSection(_Section):
    """Where ZeRO-3 keeps its share of the parameters between uses."""

    device: Literal["none", "cpu", "nvme"] = "none"
    pin_memory: bool = Field(True, description="page-locked memory: faster copies, never swapped out")
    nvme_path: Path | None = Field(None, description="folder on the local NVMe disk")
    buffer_count: int = Field(5, ge=1, description="nvme: buffers")
    buffer_size: int = Field(100_000_000, ge=1, description="nvme: elements per buffer; holds the largest parameter")
    max_in_cpu: int = Field(1_000_000_000, ge=0, description="nvme: elements that may stay in CPU memory")


class ZeroSection(_Section):
    """DeepSpeed ZeRO and its collectives. Names are DeepSpeed's; docs/parallelism.md says when to change them.

    A key that DeepSpeed would ignore in the chosen stage is refused.
    """

    stage: Literal[0, 1, 2, 3] = 1
    reduce_bucket_size: int = Field(50_000_000, ge=1, description="elements per gradient bucket (stages 1 to 3)")
    allgather_bucket_size: int = Field(200_000_000, ge=2, description="elements per parameter bucket (stages 1 and 2)")
    overlap_comm: bool | None = Field(
        None, description="reduce gradients while backward runs; empty: yes without a pipeline"
    )
    contiguous_gradients: bool = Field(
        True, description="copy gradients into one buffer as they arrive (stages 1 to 3)"
    )
    reduce_dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="dtype for sums of gradients over ranks; auto: grad_accum_dtype"
    )
    grad_accum_dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="dtype for sums of gradients over micro-batches; auto: precision"
    )
    round_robin_gradients: bool = Field(False, description="assign parameters to ranks in turn (stages 1 and 2)")
    stage3_prefetch_bucket_size: int = Field(50_000_000, ge=0, description="elements gathered ahead of use")
    stage3_param_persistence_threshold: int = Field(
        100_000, ge=0, description="parameters with fewer elements stay gathered"
    )
    stage3_max_live_parameters: int = Field(1_000_000_000, ge=0, description="elements that may be gathered at once")
    stage3_max_reuse_distance: int = Field(
        1_000_000_000, ge=0, description="a parameter used again within this many elements is not released"
    )
    zero_hpz_partition_size: int = Field(1, ge=1, description="ZeRO++ hpZ: ranks of a node that keep a second copy")
    zero_quantized_weights: bool = Field(False, description="ZeRO++ qwZ: gather parameters in int8 (CUDA)")
    zero_quantized_gradients: bool = Field(False, description="ZeRO++ qgZ: reduce gradients in int4 (CUDA, nodes)")
    offload_optimizer: OffloadOptimizerSection = OffloadOptimizerSection()
    offload_param: OffloadParamSection = OffloadParamSection()


class Fp16Section(_Section):
    """Dynamic loss scaling of precision=fp16."""

    initial_scale_power: int = Field(16, ge=0, le=32, description="the first scale is 2 to this power")
    loss_scale_window: int = Field(1000, ge=1, description="steps without overflow after which the scale doubles")
    hysteresis: int = Field(2, ge=1, description="overflows after which the scale is halved")
    min_loss_scale: int = Field(1, ge=1)


class Fp8Section(_Section):
    """The products of precision=fp8."""

    emulate: bool = Field(False, description="on a CPU: compute the FP8 products in software, slowly, to try them")


class CheckpointSection(_Section):
    """When to save and what to keep."""

    every_steps: int | None = Field(1000, ge=1)
    every_minutes: float | None = Field(None, gt=0.0)
    hours_between_failures: float | None = Field(
        None, gt=0.0, description="mean for the whole job; saves at the interval that loses the least time"
    )
    asynchronous: bool = Field(
        True, description="keep training while a checkpoint is written; copies the rank's state to CPU memory"
    )
    keep: int = Field(3, ge=1, description="how many of the newest good checkpoints to keep")
    keep_every: int | None = Field(None, ge=1, description="also keep checkpoints whose step is a multiple of this")


class SpikeSection(_Section):
    """What counts as a loss spike and what happens then; docs/train.md has the rule."""

    policy: Literal["off", "warn", "skip", "rollback"] = Field(
        "warn", description="skip: no update in that step; rollback: to the last checkpoint, without the data since"
    )
    sigmas: float = Field(6.0, gt=0.0, description="standard deviations above the mean of the previous steps")
    window: int = Field(200, ge=2, description="steps that the mean covers, and that pass before a loss is judged")
    max_rollbacks: int = Field(5, ge=1, description="rollbacks of one run; the next spike ends it")


class WatchdogSection(_Section):
    """When to end a run that makes no progress, and which rank counts as slow; docs/train.md says how.

    A time-out is on silence, without any progress, and grows with the durations of the run itself; empty: none.
    """

    enabled: bool = True
    heartbeat_seconds: float = Field(5.0, ge=0.05, description="interval of the heartbeats in RUN/heartbeats")
    start_seconds: float | None = Field(1200.0, gt=0.0, description="time-out until the end of the first step")
    step_seconds: float | None = Field(300.0, gt=0.0, description="smallest time-out of a step")
    evaluation_seconds: float | None = Field(1200.0, gt=0.0, description="smallest time-out of an evaluation")
    checkpoint_seconds: float | None = Field(1200.0, gt=0.0, description="smallest time-out of a save")
    factor: float = Field(10.0, ge=1.0, description="time-out over the slowest of the last hundred of its kind")
    collective_seconds: float = Field(1800.0, gt=0.0, description="time-out of the process group, the last resort")
    slow_share: float | None = Field(
        0.3, gt=0.0, description="name a rank whose own work takes this much longer than the median; empty: none"
    )


class RunConfig(_Section):
    """Everything that describes one run."""

    run: RunSection
    data: DataSection
    model: ModelSection = ModelSection()
    objective: ObjectiveSection = ObjectiveSection()
    mlm: MlmSection = MlmSection()
    train: TrainSection = TrainSection()
    optim: OptimSection = OptimSection()
    parallel: ParallelSection = ParallelSection()
    zero: ZeroSection = ZeroSection()
    precision: Literal["fp32", "bf16", "fp16", "fp8"] = Field(
        "fp32", description="fp8: as bf16, with the encoder's matrix products in FP8 (H100 and later)"
    )
    fp16: Fp16Section = Fp16Section()
    fp8: Fp8Section = Fp8Section()
    checkpoint: CheckpointSection = CheckpointSection()
    spike: SpikeSection = SpikeSection()
    watchdog: WatchdogSection = WatchdogSection()
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="passed through to DeepSpeed's configuration")

    @property
    def recompute_layers(self) -> int:
        """How many encoder layers are recomputed in backward."""
        number = str(self.train.recompute_layers)
        if self.train.recompute is not None:
            number = self.train.recompute.removeprefix("layers:")
        if number == "all":
            return self.model.num_layers
        return min(int(number), self.model.num_layers) if number.isdecimal() else 0

    @property
    def recomputes_elementwise(self) -> bool:
        """True if the element-wise part of every feed-forward block is computed again in backward."""
        return self.train.recompute == "elementwise"

    @property
    def weight_precision(self) -> Literal["fp32", "bf16", "fp16"]:
        """The precision of weights and gradients: FP8 is one of products only, so DeepSpeed sees bf16."""
        return "bf16" if self.precision == "fp8" else self.precision

    @property
    def is_contrastive(self) -> bool:
        """True if the TACO loss is part of the total loss."""
        return self.objective.contrastive_weight > 0

    def grad_accum_steps(self, dp_size: int) -> int:
        """Micro-steps per optimizer step on `dp_size` data-parallel ranks."""
        return self.train.global_batch_size // (self.train.micro_batch_size * dp_size)
