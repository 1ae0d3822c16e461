"""Every communication and offload key that runs on a CPU, against one plain PyTorch process.

The plain process is that of `test_zero_parity`: clipping active, dropout on. What needs CUDA is refused, see
`tests/config/test_zero_checks.py`.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.utils.cpp_extension
from engine_runs import engine_rank, engine_ranks
from forked import run_ranks
from layouts import SETTING
from parity import TOLERANCE, deviation, load, plain_process, train

from pretrain.config.deepspeed import build_ds_config

pytestmark = pytest.mark.slow

CPU_OFFLOAD = "zero.offload_optimizer={device: cpu}"
EXACT = {
    "1, gradients where they are": (2, "zero.stage=1", "zero.contiguous_gradients=false"),
    "2, gradients where they are": (2, "zero.stage=2", "zero.contiguous_gradients=false"),
    "2, no overlap": (2, "zero.stage=2", "zero.overlap_comm=false"),
    "2, many buckets": (2, "zero.stage=2", "zero.reduce_bucket_size=1000", "zero.allgather_bucket_size=1000"),
    "1, round robin": (2, "zero.stage=1", "zero.round_robin_gradients=true"),
    "1, optimizer offloaded": (2, "zero.stage=1", CPU_OFFLOAD),
    "2, optimizer offloaded, round robin": (2, "zero.stage=2", CPU_OFFLOAD, "zero.round_robin_gradients=true"),
    "3, optimizer and parameters offloaded": (2, "zero.stage=3", CPU_OFFLOAD, "zero.offload_param={device: cpu}"),
    "3, parameters offloaded": (2, "zero.stage=3", "zero.offload_param={device: cpu, pin_memory: false}"),
    "3, nothing stays gathered": (
        2,
        "zero.stage=3",
        "zero.stage3_param_persistence_threshold=0",
        "zero.stage3_prefetch_bucket_size=100",
        "zero.stage3_max_live_parameters=1000",
        "zero.stage3_max_reuse_distance=100",
    ),
    "3, second copy per pair of ranks": (
        4,
        "zero.stage=3",
        "zero.zero_hpz_partition_size=2",
        "zero.stage3_param_persistence_threshold=0",
    ),
}
LAYOUTS = {
    "PP2 x DP2, optimizer offloaded": (4, "parallel.pipeline=2", CPU_OFFLOAD),
    "PP2, gradients where they are": (2, "parallel.pipeline=2", "zero.contiguous_gradients=false"),
    "TP2 x DP2 ZeRO-2, optimizer offloaded": (4, "parallel.tensor=2", "zero.stage=2", CPU_OFFLOAD),
    "TP2 x DP2 ZeRO-3, all offloaded": (
        4,
        "parallel.tensor=2",
        "zero.stage=3",
        CPU_OFFLOAD,
        "zero.offload_param={device: cpu}",
    ),
}
COMPILED = {
    "ZeRO-1": (2, "zero.stage=1"),
    "ZeRO-2, recomputing": (2, "zero.stage=2", "train.recompute_layers=all"),
    "TP2": (2, "parallel.tensor=2"),
    "PP2": (2, "parallel.pipeline=2"),
    "from embedding to head": (1, "train.compile=full", "train.recompute_layers=1"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zero_options")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return run_ranks(1, plain_process, load(folder))[0]


@pytest.fixture(scope="module")
def layout_reference(folder: Path) -> Any:
    import megatron.core.tensor_parallel  # noqa: F401  # before the ranks fork

    return run_ranks(1, plain_process, load(folder, *SETTING))[0]


def check(results: list[Any], reference: Any) -> None:
    """Figures of every rank, and the final weights of the first."""
    expected, weights = reference
    for figures, _ in results:
        assert deviation(figures, expected) < TOLERANCE
    found = results[0][1]
    assert found.keys() == weights.keys()
    assert max(float((found[name] - weight).abs().max()) for name, weight in weights.items()) < TOLERANCE


@pytest.mark.parametrize("world_size", [2, 4])
def test_zero_options_change_no_figure(
    world_size: int, folder: Path, tmp_path: Path, reference: Any, subtests: pytest.Subtests
) -> None:
    """All options that so many ranks can show, one after the other in one process group."""
    configs = {name: load(folder, *overrides) for name, (size, *overrides) in EXACT.items() if size == world_size}
    by_rank = run_ranks(world_size, engine_ranks, configs, tmp_path, timeout=280)
    for name in configs:
        with subtests.test(name):
            check([runs[name] for runs in by_rank], reference)


def test_lamb_stays_exact_when_its_state_is_offloaded(folder: Path, tmp_path: Path) -> None:
    config = load(folder, "optim.name=lamb", "zero.stage=2", CPU_OFFLOAD)
    check(run_ranks(2, engine_rank, config, tmp_path), run_ranks(1, plain_process, config)[0])


def _has_cpu_adam() -> bool:
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or torch.utils.cpp_extension.get_default_build_root()
    return any(Path(root).rglob("cpu_adam.so"))


@pytest.mark.skipif(not _has_cpu_adam(), reason="DeepSpeedCPUAdam is not built here, and building takes minutes")
@pytest.mark.parametrize(
    "overrides",
    [("zero.stage=1", CPU_OFFLOAD), ("zero.stage=3", "zero.offload_optimizer={device: cpu, ratio: 0.5}")],
    ids=["all", "half"],
)
def test_deepspeeds_own_adam_on_offloaded_state(
    overrides: tuple[str, ...], folder: Path, tmp_path: Path, reference: Any
) -> None:
    config = load(folder, *overrides, "optim.implementation=deepspeed")
    check(run_ranks(2, engine_rank, config, tmp_path), reference)


@pytest.mark.parametrize("name", LAYOUTS)
def test_offload_and_buffers_in_other_layouts(name: str, folder: Path, layout_reference: Any) -> None:
    world_size, *overrides = LAYOUTS[name]
    check(run_ranks(world_size, train, load(folder, *SETTING, *overrides)), layout_reference)


def test_gradients_are_reduced_in_the_format_asked_for(
    folder: Path, tmp_path: Path, reference: Any, subtests: pytest.Subtests
) -> None:
    configs = {f"stage {n}": load(folder, f"zero.stage={n}", "zero.reduce_dtype=bf16") for n in range(4)}
    runs = run_ranks(2, engine_ranks, configs, tmp_path)[0]
    for stage, (figures, _) in runs.items():
        with subtests.test(stage):
            # bf16 keeps 8 bits: it must show, and it must stay small.
            assert 1e-5 < deviation(figures, reference[0]) < 3e-3


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_layers_equal_one_plain_process(
    name: str, folder: Path, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout: compiled layers drop the same units."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))  # where compiled code is kept
    import megatron.core.tensor_parallel  # noqa: F401  # before the ranks fork

    world_size, *overrides = COMPILED[name]
    config = load(folder, "train.compile=true", *overrides)
    check(run_ranks(world_size, train, config, timeout=600), reference)


def test_what_a_stage_does_not_read_is_not_written(folder: Path) -> None:
    def keys(*overrides: str) -> set[str]:
        return set(build_ds_config(load(folder, *overrides), dp_size=2)["zero_optimization"])

    assert keys("zero.stage=0") == {"stage"}
    assert "stage3_prefetch_bucket_size" in keys("zero.stage=3") - keys("zero.stage=2")
    assert "allgather_bucket_size" in keys("zero.stage=2") - keys("zero.stage=3")
    assert "offload_optimizer" in keys(CPU_OFFLOAD) - keys()
