"""Every layout that four processes can hold against one plain process: losses, gradient norms and final weights.

The plain process and its batches are those of `test_zero_parity`; clipping is active. Dropout is off here, because the
attention weights of a tensor-parallel rank's heads drop by another seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as distributed
from forked import run_ranks
from test_zero_parity import STEPS, Figures, build, deviation, evaluate, load, plain_process

from pretrain import parallel
from pretrain.config import RunConfig
from pretrain.engine import Engine, PlainEngine, zero_stage
from pretrain.optim import learning_rate
from pretrain.pipeline_engine import PipelinedEngine

pytestmark = pytest.mark.slow  # importing megatron-core alone takes seconds

TOLERANCE = 1e-5
NO_DROPOUT = ("model.hidden_dropout=0", "model.attention_dropout=0")
# Adam divides by the size of the gradient: with its usual eps, one that is nothing but rounding becomes a full step.
SETTING = (*NO_DROPOUT, "model.num_layers=4", "optim.eps=1e-4")
LAYOUTS = {
    "TP2 ZeRO-0": (2, "parallel.tensor=2", "zero.stage=0"),
    "TP2 ZeRO-1": (2, "parallel.tensor=2", "zero.stage=1"),
    "TP2 ZeRO-2": (2, "parallel.tensor=2", "zero.stage=2"),
    "TP2 ZeRO-3": (2, "parallel.tensor=2", "zero.stage=3"),
    "TP4 ZeRO-1": (4, "parallel.tensor=4"),
    "TP2 x DP2 ZeRO-1": (4, "parallel.tensor=2", "zero.stage=1"),
    "TP2 x DP2 ZeRO-3": (4, "parallel.tensor=2", "zero.stage=3"),
    "TP2 + SP ZeRO-1": (2, "parallel.tensor=2", "parallel.sequence=true"),
    "TP2 + SP x DP2 ZeRO-2": (4, "parallel.tensor=2", "parallel.sequence=true", "zero.stage=2"),
    "TP2 + SP recomputing": (2, "parallel.tensor=2", "parallel.sequence=true", "train.recompute_layers=all"),
    "PP2": (2, "parallel.pipeline=2"),
    "PP4": (4, "parallel.pipeline=4"),
    "PP2 uneven": (2, "parallel.pipeline=2", "parallel.stage_layers=[3,1]"),
    "PP2 ZeRO-0 runs as ZeRO-1": (2, "parallel.pipeline=2", "zero.stage=0"),
    "PP2 x DP2": (4, "parallel.pipeline=2"),
    "PP2 x TP2": (4, "parallel.pipeline=2", "parallel.tensor=2"),
    "PP2 x TP2 + SP": (4, "parallel.pipeline=2", "parallel.tensor=2", "parallel.sequence=true"),
    "PP2 recomputing": (2, "parallel.pipeline=2", "train.recompute_layers=all"),
    "TP2 recomputing one": (2, "parallel.tensor=2", "train.recompute_layers=1"),
}


@pytest.fixture(scope="module", autouse=True)
def _import_megatron_once() -> None:
    import megatron.core.tensor_parallel  # noqa: F401  # before the ranks fork


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[str, Any]:
    return {
        name: run_ranks(1, plain_process, load(folder, *SETTING, f"optim.name={name}"))[0] for name in ("adamw", "lamb")
    }


def train(config: RunConfig) -> tuple[Figures, dict[str, torch.Tensor]]:
    """One rank of the real engine: figures of the steps and of an evaluation, and full final weights."""
    device = torch.device("cpu")
    parallel.start_process_group(parallel.read_launch(), device)
    mesh = parallel.start_mesh(config.parallel, device)
    model, source = build(config, mesh)
    engine = (PlainEngine if mesh.pp_size == 1 else PipelinedEngine)(config, model, device, mesh)
    per_step = config.train.global_batch_size // config.train.micro_batch_size
    figures: Figures = []
    for step in range(STEPS):
        share = range(step * per_step + mesh.dp_rank, (step + 1) * per_step, mesh.dp_size)
        result = engine.train_step(
            [source.micro_batch(index) for index in share],
            learning_rate=learning_rate(step, config.optim, config.train.steps),
        )
        figures.append((result.loss, result.mlm_loss, result.contrastive_loss, result.grad_norm))
    figures.append(evaluate(engine, source))
    return figures, full_weights(engine, mesh)


def full_weights(engine: Engine, mesh: parallel.Mesh) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    weights: dict[str, torch.Tensor] = {}
    for name, parameter in engine.engine.module.named_parameters():
        if zero_stage(engine.config) == 0:
            part = parameter.detach().clone()
        else:
            part = safe_get_full_fp32_param(parameter).clone()
            part = part.view(getattr(parameter, "ds_shape", parameter.shape))
        if mesh.tensor_group is not None and getattr(parameter, "tensor_model_parallel", False):
            parts = [torch.empty_like(part) for _ in range(mesh.tp_size)]
            distributed.all_gather(parts, part.contiguous(), group=mesh.tensor_group)
            part = torch.cat(parts, dim=parameter.partition_dim)
            part = part[: getattr(parameter, "num_words", len(part))]
        weights[name] = part
    stages = parallel.gather_objects(weights)  # of a pipeline; the other ranks have the same
    return {name: tensor for stage in stages for name, tensor in stage.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_plain_process(name: str, folder: Path, references: dict[str, Any]) -> None:
    world_size, *overrides = LAYOUTS[name]
    check(run_ranks(world_size, train, load(folder, *SETTING, *overrides)), references["adamw"])


def test_lamb_norms_cover_all_parts(folder: Path, references: dict[str, Any]) -> None:
    overrides = ("parallel.tensor=2", "zero.stage=1", "optim.name=lamb")
    check(run_ranks(4, train, load(folder, *SETTING, *overrides)), references["lamb"])


def check(results: list[Any], reference: tuple[Figures, dict[str, torch.Tensor]]) -> None:
    expected, weights = reference
    for figures, found in results:
        assert deviation(figures, expected) < TOLERANCE
        assert found.keys() == weights.keys()
        for name, weight in weights.items():
            assert torch.allclose(found[name], weight, rtol=0, atol=TOLERANCE), name
