"""Full fp32 weights from any checkpoint, by parameter name, for exports and for runs that start from weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
import torch.distributed as distributed
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pretrain import durable
from pretrain.checkpoint.manifest import CheckpointManifest
from pretrain.checkpoint.state_files import StateReader
from pretrain.durable import FileRecord
from pretrain.errors import CheckpointError
from pretrain.model.parameter_shape import parameter_shape
from pretrain.parallel.collectives import first_failure

if TYPE_CHECKING:
    from pretrain.model.bert import Bert
    from pretrain.model.pipeline import BertPipeline
    from pretrain.parallel.mesh import Mesh

WEIGHTS_FILE = "weights.safetensors"


class WeightFiles:
    """The opened weights of a checkpoint folder; a tensor is read from the disk on request.

    Nothing is compared with the manifest's hashes here: a caller verifies the checkpoint once, before.

    Attributes:
        folder: the checkpoint.
        shapes: full shape of every parameter by name.

    Raises:
        CheckpointError: a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = ExitStack()
        self._read: Callable[[str], torch.Tensor]
        if CheckpointManifest.load(folder).kind == "weights":
            self._open_file(folder / WEIGHTS_FILE)
        else:
            state = self._files.enter_context(StateReader(folder))
            self.shapes = {name: shape.full for name, shape in state.shapes.items()}
            self._read = state.read_full

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._files.close()

    def read(self, name: str) -> torch.Tensor:
        """The whole parameter, fp32 on the CPU.

        Raises:
            CheckpointError: the file cannot be read.
        """
        try:
            return self._read(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder}: {name}: cannot be read as weights: {error}") from None

    def _open_file(self, path: Path) -> None:
        try:
            file = self._files.enter_context(safe_open(path, framework="pt"))
            names = list(file.keys())
            self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read as weights: {error}") from None
        self._read = file.get_tensor


def read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Full fp32 weights of a verified checkpoint folder, parameter name -> tensor on CPU.

    Raises:
        CheckpointError: a file cannot be read.
    """
    with WeightFiles(checkpoint) as files:
        return {name: files.read(name) for name in sorted(files.shapes)}


def write_weights(folder: Path, weights: dict[str, torch.Tensor]) -> FileRecord:
    """Write fp32 weights durably into `folder`; returns the file's record for the manifest.

    Raises:
        OSError: the disk refuses.
    """
    path = folder / WEIGHTS_FILE
    try:
        save_file(_apart({name: tensor.float().contiguous() for name, tensor in weights.items()}), path)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(f"{path}: {error}") from None
    durable.follow_umask(path)
    durable.sync_file(path)
    return durable.record_of(path, folder)


def _apart(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of which no two share memory, as layers may that a program tied; safetensors refuses them."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in weights.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return apart


def load_weights_into(model: Bert | BertPipeline, checkpoint: Path, mesh: Mesh, device: torch.device) -> int:
    """Set every parameter of `model`, or this rank's part of it, from a verified checkpoint folder; collective.

    One rank of each data-parallel group reads what its model needs, and sends it to the others through `device`.

    Returns:
        The number of parameters in the checkpoint.

    Raises:
        CheckpointError: names or shapes differ, each is listed; a tensor cannot be read, or is not finite.
    """
    group = mesh.data_group
    source = 0 if group is None else distributed.get_global_rank(group, 0)
    with ExitStack() as stack:
        files, problem = None, None
        try:
            files = stack.enter_context(WeightFiles(checkpoint))
            _check_shapes(model, files.shapes, checkpoint)
        except CheckpointError as error:
            problem = str(error)
        failure = first_failure(problem)
        if failure is not None or files is None:
            raise CheckpointError(failure or problem)
        for name, parameter in model.named_parameters():
            if mesh.dp_rank == 0 and problem is None:  # after a problem the others still wait for what is sent
                problem = _read_into(model, name, parameter, files, mesh)
            if mesh.dp_size > 1:
                sent = parameter.data.to(device)
                distributed.broadcast(sent, source, group=group)
                parameter.data.copy_(sent)
        failure = first_failure(problem)
        if failure is not None:
            raise CheckpointError(failure)
        return len(files.shapes)


def _read_into(
    model: Bert | BertPipeline, name: str, parameter: torch.nn.Parameter, files: WeightFiles, mesh: Mesh
) -> str | None:
    """Set this rank's part of one parameter; returns why it cannot be."""
    try:
        full = files.read(name)
    except CheckpointError as error:
        return str(error)
    if number := full.numel() - int(torch.isfinite(full).sum()):
        return f"{files.folder}: {name}: {number:,} of {full.numel():,} values are NaN or infinite; start from another"
    shape = parameter_shape(parameter, model.layers)
    parameter.data.copy_(shape.part_of(full, mesh.tp_rank, mesh.tp_size))
    return None


def _check_shapes(model: Bert | BertPipeline, saved: Mapping[str, tuple[int, ...]], checkpoint: Path) -> None:
    expected = {name: parameter_shape(parameter, model.layers).full for name, parameter in model.named_parameters()}
    if hasattr(model, "stage_id"):  # a pipeline stage has some of the parameters
        saved = {name: shape for name, shape in saved.items() if name in expected}
    problems = [
        f"{name}: the model has {expected.get(name, 'no such parameter')}, the checkpoint {saved.get(name, 'none')}"
        for name in sorted(expected.keys() | saved.keys())
        if expected.get(name) != saved.get(name)
    ]
    if problems:
        listing = "\n  ".join(problems[:10])
        raise CheckpointError(
            f"{checkpoint}: does not fit the model ({len(problems)} parameters differ); "
            f"compare the model section of its manifest.json with yours\n  {listing}"
        )
