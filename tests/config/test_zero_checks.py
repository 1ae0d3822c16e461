"""ZeRO, communication, offload and loss-scaling keys: what is refused, and that DeepSpeed's own names arrive."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from project import CONFIGS

from pretrain.config.checks import check_world_size
from pretrain.config.deepspeed import OWNED_DEEPSPEED_KEYS, STAGES_OF_ZERO_KEYS, build_ds_config
from pretrain.config.load import load_config, resolve_config
from pretrain.config.sections import RunConfig
from pretrain.config.zero_checks import check_zero_device
from pretrain.errors import ConfigError

PRESETS = sorted((CONFIGS / "zero").glob("*.yaml"))


def config(*overrides: str) -> RunConfig:
    return resolve_config(Path("run.yaml"), {"run": {"output_dir": "x"}, "data": {"train": ["d"]}}, overrides)


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config(*overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["zero.offload_param={device: cpu}"], "zero.offload_param is read by ZeRO stage 3 only, and this run has"),
        (["zero.stage=0", "zero.offload_optimizer={device: cpu}"], "is read by ZeRO stage 1 or 2 or 3 only"),
        (["zero.stage=0", "zero.reduce_bucket_size=1000"], "zero.reduce_bucket_size is read by ZeRO stage"),
        (["zero.stage=3", "zero.allgather_bucket_size=1000"], "set zero.stage=2, or leave allgather_bucket_size out"),
        (["zero.stage=3", "zero.round_robin_gradients=true"], "zero.round_robin_gradients is read by"),
        (["zero.stage=2", "zero.stage3_max_live_parameters=1000"], "zero.stage3_max_live_parameters is read by"),
        (["zero.stage=2", "zero.zero_hpz_partition_size=8"], "zero.zero_hpz_partition_size is read by"),
        (["zero.stage=1", "zero.zero_quantized_gradients=true"], "zero.zero_quantized_gradients is read by"),
        (["parallel.pipeline=2", "zero.overlap_comm=true"], "DeepSpeed's pipelines reduce after the last micro-batch"),
        (["zero.stage=2", "zero.offload_optimizer={device: nvme, nvme_path: /n}"], "would take cpu without a word"),
        (["zero.stage=3", "zero.offload_optimizer={device: nvme}"], "needs zero.offload_optimizer.nvme_path"),
        (["zero.offload_optimizer={device: cpu, ratio: 0.5}"], "needs zero.stage=3 (found 1) and optim.implementation"),
        (
            ["zero.offload_optimizer={pin_memory: false}"],
            "pin_memory is not read with zero.offload_optimizer.device=none",
        ),
        (["zero.stage=3", "zero.offload_param={device: cpu, max_in_cpu: 5}"], "max_in_cpu is not read with"),
        (["zero.offload_optimizer={device: cpu}", "zero.contiguous_gradients=false"], "keeps gradients contiguous"),
        (["zero.offload_optimizer={device: disk}"], "'none', 'cpu' or 'nvme'"),
        (["zero.offload_optimiser={device: cpu}"], "did you mean zero.offload_optimizer?"),
        (["zero.offload_optimizer={devise: cpu}"], "did you mean zero.offload_optimizer.device?"),
        (["zero.stage=3", "zero.zero_hpz_partition_size=2", "parallel.tensor=2"], "ranks that hold different parts"),
        (["zero.grad_accum_dtype=bf16"], "zero.grad_accum_dtype (bf16) holds less than precision=fp32"),
        (["precision=bf16", "zero.grad_accum_dtype=fp32"], "use zero.stage=2, or"),
        (
            ["precision=bf16", "zero={stage: 2, grad_accum_dtype: fp32, offload_optimizer: {device: cpu}}"],
            "there in precision=bf16 all the same",
        ),
        (["precision=bf16", "zero.reduce_dtype=fp16"], "does not go with precision=bf16; use fp32"),
        (["fp16.hysteresis=3"], "fp16.* scales the loss of precision=fp16, and precision is fp32"),
        (["optim.name=lamb", "optim.implementation=deepspeed"], "takes ZeRO's slices for layers"),
        (["train.compile=true", "zero.stage=3"], "train.compile=layers with zero.stage=3"),
        (["train.compile=full", "zero.stage=3"], "use zero.stage=2 or train.compile=off"),
        (["train.compile=full", "parallel.tensor=2"], "use train.compile=layers or parallel.tensor=1"),
        (["train.compile=full", "parallel.pipeline=2"], "use train.compile=layers or parallel.pipeline=1"),
        (["run.device=cpu", "precision=fp16"], "precision=fp16 needs a CUDA GPU"),
        (["run.device=cpu", "precision=fp8"], "precision=bf16, or set fp8.emulate=true to compute its products in"),
        (["precision=fp8", "parallel.tensor=2"], "have no FP8 products; set parallel.tensor=1, or precision=bf16"),
        (["precision=fp8", "model.ffn_hidden_size=1000"], "try model.ffn_hidden_size=1008, or precision=bf16"),
        (["run.device=cuda", "precision=fp8", "fp8.emulate=true"], "run.device is cuda; leave it out"),
        (["precision=bf16", "fp8.emulate=true"], "and precision is bf16; leave it out"),
        (["precision=fp8", "fp16.hysteresis=3"], "and precision is fp8; leave it out"),
        (["deepspeed={prescale_gradients: true}"], "deepspeed.prescale_gradients is ignored under ZeRO"),
        (["deepspeed={communication_data_type: fp32}"], "is set by zero.reduce_dtype"),
    ],
)
def test_what_would_be_ignored_or_fail_late_is_refused(overrides: list[str], words: str) -> None:
    assert words in refusal(*overrides)


def test_every_problem_is_told_at_once() -> None:
    message = refusal("zero.offload_param={device: cpu}", "fp16.hysteresis=3", "deepspeed={fp16: {}}")
    assert "3 problems" in message


def test_a_second_copy_must_divide_the_data_parallel_size() -> None:
    hierarchical = config("zero.stage=3", "zero.zero_hpz_partition_size=8")
    (problem,) = check_world_size(hierarchical, 4)
    assert "(8) must divide the data-parallel size (4); try 4" in problem
    assert check_world_size(hierarchical, 16) == []


@pytest.mark.parametrize(
    "overrides",
    [
        ["precision=fp16"],
        ["zero.stage=3", "zero.zero_quantized_weights=true"],
        ["zero.stage=3", "zero.offload_param={device: nvme, nvme_path: /n}"],
        ["zero.stage=3", "zero.offload_optimizer={device: nvme, nvme_path: /n}"],
        ["optim.implementation=deepspeed"],
    ],
)
def test_what_needs_a_gpu_says_so_on_the_cpu(overrides: list[str]) -> None:
    (problem,) = check_zero_device(config(*overrides), "cpu", num_nodes=2)
    assert "needs a CUDA GPU" in problem
    assert check_zero_device(config(*overrides), "cuda", num_nodes=2) == []


def test_quantized_gradients_need_a_second_node() -> None:
    quantized = config("zero.stage=3", "zero.zero_quantized_gradients=true")
    (problem,) = check_zero_device(quantized, "cuda", num_nodes=1)
    assert "all ranks are on one node" in problem


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_default_fits_every_stage(stage: int) -> None:
    assert build_ds_config(config(f"zero.stage={stage}"), 4)["zero_optimization"]["stage"] == stage


def test_types_of_gradients() -> None:
    def found(*overrides: str) -> tuple[str, str]:
        made = build_ds_config(config(*overrides), 4)
        return made["data_types"]["grad_accum_dtype"], made["communication_data_type"]

    assert found() == ("fp32", "fp32")
    assert found("precision=bf16") == ("bf16", "bf16")
    assert found("precision=fp8") == ("bf16", "bf16")
    assert found("precision=bf16", "zero.reduce_dtype=fp32") == ("bf16", "fp32")
    assert found("precision=bf16", "zero.stage=2", "zero.grad_accum_dtype=fp32") == ("fp32", "fp32")


def test_loss_scaling_arrives() -> None:
    given = ["precision=fp16", "fp16={initial_scale_power: 12, loss_scale_window: 500, hysteresis: 4}"]
    wanted = {
        "enabled": True,
        "initial_scale_power": 12,
        "loss_scale_window": 500,
        "hysteresis": 4,
        "min_loss_scale": 1,
    }
    assert build_ds_config(config(*given), 4)["fp16"] == wanted


def test_offload_arrives_without_what_is_empty() -> None:
    given = [
        "zero.stage=3",
        "zero.offload_optimizer={device: nvme, nvme_path: /local}",
        "zero.offload_param.device=cpu",
    ]
    zero = build_ds_config(config(*given), 4)["zero_optimization"]
    assert zero["offload_optimizer"]["nvme_path"] == "/local"
    assert zero["offload_param"]["device"] == "cpu"
    assert "nvme_path" not in zero["offload_param"]


def test_deepspeed_knows_every_key() -> None:
    """Against DeepSpeed's own models, which refuse what they do not know."""
    from deepspeed.runtime.precision_config import DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert set(STAGES_OF_ZERO_KEYS) | {"stage", "reduce_dtype", "grad_accum_dtype"} == set(
        type(config().zero).model_fields
    )
    offload = ["zero.offload_optimizer={device: cpu}", "zero.offload_param={device: cpu}", "precision=fp16"]
    made = build_ds_config(config("zero.stage=3", *offload), 4)
    DeepSpeedZeroConfig(**made["zero_optimization"])
    DeepSpeedZeroConfig(**build_ds_config(config("zero.stage=2"), 4)["zero_optimization"])
    DeepSpeedFP16Config(**made["fp16"])


def test_owned_keys_are_disjoint_from_what_is_passed_through() -> None:
    made = build_ds_config(config("deepspeed={wall_clock_breakdown: true}"), 4)
    assert made.pop("wall_clock_breakdown") is True
    assert set(made) <= set(OWNED_DEEPSPEED_KEYS)


def test_a_dry_run_refuses_them_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("run: {output_dir: x}\ndata: {train: [d]}\ndeepspeed: {zero_optimization: {}}\n")
    program = (
        "import sys; sys.argv = ['taco', 'train', '--config', sys.argv[1], '--dry-run']\n"
        "from pretrain.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    sys.exit(end.code if 'torch' not in sys.modules else 'torch was imported')\n"
    )
    result = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert "deepspeed.zero_optimization is set by zero.*" in result.stderr


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_go_on_top_of_the_large_model(path: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(f"extends: [{CONFIGS / 'taco_large.yaml'}, {path}]\nrun: {{output_dir: own}}\n")
    loaded = load_config(own, world_size=32)
    assert (loaded.model.num_layers, str(loaded.run.output_dir)) == (24, "own")
    assert str(loaded.zero.stage) in path.stem
    assert load_config(own, world_size=32).zero != load_config(CONFIGS / "taco_large.yaml").zero


def test_there_are_presets() -> None:
    assert PRESETS
