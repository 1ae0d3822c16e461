"""What `train.compile` and `train.cuda_graphs` come to, by device and layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.config.compile_checks import compile_mode, why_no_graphs
from pretrain.config.load import resolve_config
from pretrain.config.sections import RunConfig, TrainSection

GRAPHS = "train.cuda_graphs=true"


def config(*overrides: str) -> RunConfig:
    return resolve_config(Path("run.yaml"), {"run": {"output_dir": "x"}, "data": {"train": ["d"]}}, overrides)


@pytest.mark.parametrize(
    ("overrides", "on_cpu", "on_gpu"),
    [
        ([], "off", "off"),
        (["train.compile=true"], "layers", "layers"),
        (["train.compile=full"], "full", "full"),
        (["train.compile=auto"], "off", "layers"),
        (["train.compile=auto", "parallel.pipeline=2"], "off", "layers"),
        (["train.compile=auto", "zero.stage=3"], "off", "off"),
    ],
)
def test_what_is_compiled_where(overrides: list[str], on_cpu: str, on_gpu: str) -> None:
    assert (compile_mode(config(*overrides), "cpu"), compile_mode(config(*overrides), "cuda")) == (on_cpu, on_gpu)


def test_a_record_of_an_older_run_is_read() -> None:
    assert TrainSection.model_validate({"compile": True}).compile == "layers"
    assert TrainSection.model_validate({"compile": False}).compile == "off"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["zero.stage=3"], "zero.stage=3"),
        (["zero.offload_optimizer={device: cpu}"], "zero.offload_optimizer"),
        (["parallel.pipeline=2"], "parallel.pipeline (2)"),
        (["parallel.tensor=2"], "parallel.tensor (2)"),
        (["data.row_mode=pack"], "data.row_mode=pack"),
        (["train.compile=full"], "train.compile=layers"),
        (["train.recompute_layers=all"], "model.attention_dropout=0"),
    ],
)
def test_what_no_graph_can_record_is_named(overrides: list[str], words: str) -> None:
    reason = why_no_graphs(config(GRAPHS, *overrides), "cuda")
    assert reason is not None
    assert words in reason


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["zero.stage=0"],
        ["zero.stage=2", "train.compile=layers"],
        ["train.recompute_layers=all", "model.attention_dropout=0"],
    ],
)
def test_graphs_are_recorded_on_a_gpu_only(overrides: list[str]) -> None:
    assert why_no_graphs(config(GRAPHS, *overrides), "cuda") is None
    assert "CPU" in str(why_no_graphs(config(GRAPHS, *overrides), "cpu"))
