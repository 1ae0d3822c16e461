"""One rank of the real engine under ZeRO, for tests that hold it against one plain process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from parity import STEPS, Figures, build, evaluate, take_steps

from pretrain.checkpoint.state_files import StateReader
from pretrain.config.sections import RunConfig
from pretrain.engine.plain import PlainEngine
from pretrain.parallel import collectives
from pretrain.parallel.launch import read_launch, start_process_group
from pretrain.parallel.mesh import start_mesh

Run = tuple[Figures, dict[str, torch.Tensor]]


def engine_rank(config: RunConfig, folder: Path) -> Run:
    """One rank of the real engine; the final weights are read back from what it saves."""
    return engine_ranks({"": config}, folder)[""]


def engine_ranks(configs: Mapping[str, RunConfig], folder: Path) -> dict[str, Run]:
    """One rank that trains by each configuration from the start, in one process group."""
    start_process_group(read_launch(), torch.device("cpu"))
    return {name: _train(config, folder / f"run{number}") for number, (name, config) in enumerate(configs.items())}


def _train(config: RunConfig, folder: Path) -> Run:
    launch = read_launch()
    model, source = build(config)
    engine = PlainEngine(config, model, torch.device("cpu"), start_mesh(config.parallel, torch.device("cpu")))
    figures = take_steps(engine, source, 0, STEPS)
    figures.append(evaluate(engine, source))
    folder.mkdir(exist_ok=True)
    engine.save_state(folder)
    collectives.gather_objects(None)
    weights = read_all(folder) if launch.rank == 0 else {}
    return figures, weights


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """Full weights of a saved state."""
    with StateReader(folder) as reader:
        return {name: reader.read_full(name) for name in reader.shapes}
