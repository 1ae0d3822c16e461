"""Full fp32 weights out of any checkpoint, by parameter name; what an export and a fresh start from weights read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pretrain import durable
from pretrain.checkpoint.manifest import CheckpointManifest, find_checkpoint, find_problems
from pretrain.checkpoint.state_files import StateReader
from pretrain.durable import FileRecord
from pretrain.errors import CheckpointError
from pretrain.model.parameter_shape import parameter_shape

if TYPE_CHECKING:
    from pretrain.model.bert import Bert
    from pretrain.model.pipeline import BertPipeline

WEIGHTS_FILE = "weights.safetensors"


def read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Full fp32 weights of a verified checkpoint folder, parameter name -> tensor on CPU.

    Raises:
        CheckpointError: a file is missing or not what was written.
    """
    problems = find_problems(checkpoint)
    if problems:
        raise CheckpointError("\n".join(problems))
    manifest = CheckpointManifest.load(checkpoint)
    if manifest.kind == "weights":
        return _read_file(checkpoint / WEIGHTS_FILE)
    with StateReader(checkpoint) as reader:
        return {name: reader.read_full(name) for name in sorted(reader.shapes)}


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as weights: {error}") from None


def write_weights(folder: Path, weights: dict[str, torch.Tensor]) -> FileRecord:
    """Write fp32 weights durably into `folder`; the file's record for the manifest.

    Raises:
        OSError: the disk refuses.
    """
    path = folder / WEIGHTS_FILE
    try:
        save_file({name: tensor.float().contiguous() for name, tensor in weights.items()}, path)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(f"{path}: {error}") from None
    durable.sync_file(path)
    return durable.record_of(path, folder)


def load_weights_into(model: Bert | BertPipeline, path: Path) -> None:
    """Set every parameter of `model`, or this rank's part of it, from the checkpoint that `path` means.

    Raises:
        CheckpointError: names or shapes differ, each one listed.
    """
    checkpoint = find_checkpoint(path)
    weights = read_weights(checkpoint)
    shapes = {name: parameter_shape(parameter, model.layers) for name, parameter in model.named_parameters()}
    own = {name: shape.full for name, shape in shapes.items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if hasattr(model, "stage_id"):  # a pipeline stage has some of the parameters
        theirs = {name: shape for name, shape in theirs.items() if name in own}
    problems = [
        f"{name}: the model has {own.get(name, 'no such parameter')}, the checkpoint {theirs.get(name, 'none')}"
        for name in sorted(own.keys() | theirs.keys())
        if own.get(name) != theirs.get(name)
    ]
    if problems:
        listing = "\n  ".join(problems[:10])
        raise CheckpointError(
            f"{checkpoint}: does not fit the model ({len(problems)} parameters differ); "
            f"compare the model section of its manifest.json with yours\n  {listing}"
        )
    layers = model.layers
    parts = {name: shape.part_of(weights[name], layers.tp_rank, layers.tp_size) for name, shape in shapes.items()}
    model.load_state_dict(parts, strict=False)
