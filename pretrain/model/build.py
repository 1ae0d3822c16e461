"""The model of a run, or this rank's part of it: whole, tensor-parallel, or a stage of a pipeline."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from pretrain.config.compile_checks import compile_mode
from pretrain.config.sections import RunConfig
from pretrain.kernels.attention_choice import AttentionNeeds, choose_attention
from pretrain.kernels.choice import choose_kernels
from pretrain.model.fp8 import check_fp8, with_fp8_linears
from pretrain.model.layer_spec import LayerSpec, plain_layers
from pretrain.model.pretraining import BertForPretraining
from pretrain.parallel.mesh import Mesh
from pretrain.planner.stages import plan_stages
from pretrain.runlog import get_logger

if TYPE_CHECKING:
    from pretrain.model.pipeline import BertPipeline

log = get_logger(__name__)

_CPU = torch.device("cpu")


def build_model(
    config: RunConfig, vocab_size: int, mesh: Mesh, device: torch.device = _CPU
) -> BertForPretraining | BertPipeline:
    """The model with its initial weights, which depend on `run.seed` but not on the layout; collective if split.

    It is on the CPU; `device` is the one that it will compute on.
    """
    layers = choose_layers(mesh.tp_size, sequence_parallel=config.parallel.sequence)
    kernels = choose_kernels(config.train.kernels, device)
    mode, key = compile_mode(config, device.type), f"train.compile={config.train.compile}"
    has_padding = config.data.row_mode != "stream"
    needs = AttentionNeeds(
        device, config.weight_precision, config.model.attention_dropout, config.model.head_size, has_padding
    )
    layers = replace(
        layers,
        kernels=kernels,
        attention=choose_attention(config.train.attention, kernels, needs),
        recomputes_elementwise=config.recomputes_elementwise,
    )
    if config.precision == "fp8":
        check_fp8(device, is_emulated=config.fp8.emulate)
        layers = with_fp8_linears(layers)
    separate_documents = config.data.row_mode == "pack"
    if mesh.pp_size == 1:
        model = BertForPretraining(
            config.model,
            vocab_size,
            layers,
            config.objective,
            seed=config.run.seed,
            recompute_layers=config.recompute_layers,
            has_padding=has_padding,
            separate_documents=separate_documents,
        )
        if mode == "layers":
            model.compile_layers(key)
        elif mode == "full":
            model.compile_whole(key)
        return model
    from pretrain.model.pipeline import BertPipeline

    plan = plan_stages(config, vocab_size, config.grad_accum_steps(mesh.dp_size))
    slowest = max(plan.costs)
    shares = ", ".join(
        f"{number} ({100 * cost / slowest:.0f} %)" for number, cost in zip(plan.layers, plan.costs, strict=True)
    )
    log.info("pipeline: encoder layers per stage (share of the slowest stage's time): %s", shares)
    log.info("pipeline: stages wait about %.0f %% of a step; more micro-batches make this less", 100 * plan.bubble)
    stage = BertPipeline(
        config.model,
        vocab_size,
        layers,
        config.objective,
        seed=config.run.seed,
        stage_layers=plan.layers,
        grid=(mesh.pp_size, mesh.dp_size, mesh.tp_size),
        recompute_layers=config.recompute_layers,
        has_padding=has_padding,
        separate_documents=separate_documents,
    )
    if mode == "layers":
        stage.compile_layers(key)
    return stage


def choose_layers(tp_size: int, *, sequence_parallel: bool = False) -> LayerSpec:
    """The layers for a tensor-parallel size; above 1 `parallel.start_mesh` must have created the groups."""
    if tp_size == 1:
        return plain_layers()
    from pretrain.model.tensor_parallel import tensor_parallel_layers

    return tensor_parallel_layers(sequence_parallel=sequence_parallel)
