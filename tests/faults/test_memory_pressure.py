"""Memory runs out: one line that says what the run needs, and what makes it less."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import pytest
import torch
from live_ranks import live_ranks
from small_runs import VOCAB_SIZE, write_small_run

from pretrain.config.load import load_config
from pretrain.config.sections import RunConfig
from pretrain.errors import TacoError
from pretrain.model.build import build_model
from pretrain.parallel.launch import Launch
from pretrain.parallel.mesh import Mesh
from pretrain.planner.memory import count_parameters, estimate_memory
from pretrain.resilience.machine_limits import OutOfMemoryError, machine_limits_explained

ALONE = Launch(rank=0, world_size=1, local_rank=0, local_world_size=1)
LARGE = ("model.hidden_size=4096", "model.ffn_hidden_size=16384", "model.num_layers=4", "model.num_attention_heads=32")


def leave_little_memory(rank: int) -> None:
    """In a rank: 200 MB more address space than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 200_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


@pytest.mark.slow
@pytest.mark.fault("memory")
def test_a_run_without_memory_says_what_it_needs(tmp_path: Path) -> None:
    with live_ranks(1, write_small_run(tmp_path), *LARGE, before=leave_little_memory) as ranks:
        assert ranks.wait() == [1], ranks.output()
    (line,) = ranks.errors(0)
    assert "out of memory" in line
    assert "parameters with ZeRO-1 on 1 processes need about weights 3." in line
    assert "GiB per rank" in line
    assert "train.micro_batch_size" in line


@pytest.mark.fault("memory")
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("can't start new thread"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whoever_says_it(error: Exception, tmp_path: Path) -> None:
    config = load_config(write_small_run(tmp_path))
    with pytest.raises(OutOfMemoryError, match=r"GiB per rank") as caught, machine_limits_explained(config, ALONE):
        raise error
    assert "\n" not in str(caught.value)
    assert f"{count_parameters(config, VOCAB_SIZE):,} parameters" in str(caught.value)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), OSError(2, "no such file"), TacoError("out of memory")]
)
def test_other_errors_stay_what_they_are(error: Exception, tmp_path: Path) -> None:
    config = load_config(write_small_run(tmp_path))
    with pytest.raises(type(error)) as caught, machine_limits_explained(config, ALONE):
        raise error
    assert caught.value is error


def configured(tmp_path: Path, *overrides: str) -> RunConfig:
    return load_config(write_small_run(tmp_path), overrides)


@pytest.mark.parametrize("overrides", [(), ("model.num_layers=3", "model.hidden_size=48", "model.ffn_hidden_size=200")])
def test_parameters_are_counted_as_the_model_has_them(overrides: tuple[str, ...], tmp_path: Path) -> None:
    config = configured(tmp_path, *overrides)
    model = build_model(config, VOCAB_SIZE, Mesh(dp_rank=0, dp_size=1))
    assert count_parameters(config, VOCAB_SIZE) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("stage", "precision", "shares"),
    [
        (0, "fp32", (4, 4, 8)),
        (1, "fp32", (4, 4, 12 / 4)),
        (2, "fp32", (4, 4 / 4, 12 / 4)),
        (3, "fp32", (4 / 4, 4 / 4, 12 / 4)),
        (1, "bf16", (2, 2, 12 / 4)),
        (2, "bf16", (2, 2 / 4, 12 / 4)),
    ],
)
def test_shares_follow_the_formulas_of_zero(
    stage: int, precision: str, shares: tuple[float, ...], tmp_path: Path
) -> None:
    config = configured(tmp_path, f"zero.stage={stage}", f"precision={precision}")
    found = estimate_memory(config, VOCAB_SIZE, world_size=4)
    held = (found.weights, found.gradients, found.optimizer)
    assert held == pytest.approx([share * found.num_parameters for share in shares], abs=1)
    assert found.total == sum(held) + found.activations


def test_what_makes_a_run_smaller_makes_the_estimate_smaller(tmp_path: Path) -> None:
    base = estimate_memory(configured(tmp_path, *LARGE, "parallel.tensor=1"), VOCAB_SIZE, world_size=8)
    for change in ("train.micro_batch_size=2", "train.recompute_layers=all", "data.seq_length=8"):
        assert estimate_memory(configured(tmp_path, *LARGE, change), VOCAB_SIZE, 8).activations < base.activations
    for change in ("parallel.tensor=2", "parallel.pipeline=2", "zero.stage=3"):
        assert estimate_memory(configured(tmp_path, *LARGE, change), VOCAB_SIZE, 8).weights < base.weights
