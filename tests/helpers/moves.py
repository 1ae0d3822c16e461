"""One rank of a run that is saved in one layout and continued in another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from parity import STEPS, Figures, build, take_steps

from pretrain.checkpoint.state_files import MOMENTS, WEIGHT, StateReader
from pretrain.config.sections import RunConfig
from pretrain.engine.engine import Engine
from pretrain.engine.pipelined import PipelinedEngine
from pretrain.engine.plain import PlainEngine
from pretrain.parallel.launch import read_launch, start_process_group
from pretrain.parallel.mesh import start_mesh

SAVED_AT = 3

LAYOUTS = {
    "one rank": (1, "zero.stage=0"),
    "DP2 ZeRO-0": (2, "zero.stage=0"),
    "DP2 ZeRO-1": (2, "zero.stage=1"),
    "DP2 ZeRO-2": (2, "zero.stage=2"),
    "DP4 ZeRO-3": (4, "zero.stage=3"),
    "DP2 ZeRO-2 round robin, offloaded": (
        2,
        "zero.stage=2",
        "zero.round_robin_gradients=true",
        "zero.offload_optimizer={device: cpu}",
    ),
    "TP2 ZeRO-0": (2, "parallel.tensor=2", "zero.stage=0"),
    "TP2 x DP2 ZeRO-1": (4, "parallel.tensor=2", "zero.stage=1"),
    "TP2 + SP ZeRO-2": (2, "parallel.tensor=2", "parallel.sequence=true", "zero.stage=2"),
    "TP2 x DP2 ZeRO-3": (4, "parallel.tensor=2", "zero.stage=3"),
    "TP4 ZeRO-1": (4, "parallel.tensor=4", "zero.stage=1"),
    "PP2": (2, "parallel.pipeline=2"),
    "PP4": (4, "parallel.pipeline=4"),
    "PP2 x DP2": (4, "parallel.pipeline=2"),
    "PP2 x TP2 + SP": (4, "parallel.pipeline=2", "parallel.tensor=2", "parallel.sequence=true"),
}


def start_engine(config: RunConfig) -> tuple[Engine, Any]:
    device = torch.device("cpu")
    start_process_group(read_launch(), device)
    mesh = start_mesh(config.parallel, device)
    model, source = build(config, mesh)
    return (PlainEngine if mesh.pp_size == 1 else PipelinedEngine)(config, model, device, mesh), source


def begin(config: RunConfig, target: Path) -> Figures:
    """One rank: train the first steps and save."""
    engine, source = start_engine(config)
    figures = take_steps(engine, source, 0, SAVED_AT)
    engine.save_state(target)
    return figures


def go_on(config: RunConfig, origin: Path, again: Path) -> Figures:
    """One rank: load, save again as it is, train the other steps."""
    engine, source = start_engine(config)
    engine.load_state(origin)
    engine.save_state(again)
    return take_steps(engine, source, SAVED_AT, STEPS)


def read_all(checkpoint: Path) -> dict[tuple[str, str], torch.Tensor]:
    with StateReader(checkpoint) as reader:
        return {(name, kind): reader.read_full(name, kind) for name in reader.shapes for kind in (WEIGHT, *MOMENTS)}
