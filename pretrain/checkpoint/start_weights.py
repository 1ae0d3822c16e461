"""Starting a run from other weights (`run.init_from`): what must agree is compared by key before a tensor is read.

Shapes alone do not show that weights fit. Other heads, another epsilon or another vocabulary of the same size give a
model that loads, and computes something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.checkpoint.manifest import CheckpointManifest, find_checkpoint
from pretrain.checkpoint.models import compare_models, explain_refused, is_allowed
from pretrain.checkpoint.store import verify_together
from pretrain.checkpoint.tokenizers import OtherTokenizer, compare_tokenizers
from pretrain.checkpoint.weights import load_weights_into
from pretrain.config.sections import RunConfig
from pretrain.data.tokenizer.info import TokenizerInfo
from pretrain.errors import CheckpointError, ConfigError
from pretrain.parallel.collectives import ask_rank_0
from pretrain.runlog import get_logger

if TYPE_CHECKING:
    import torch

    from pretrain.model.bert import Bert
    from pretrain.model.pipeline import BertPipeline
    from pretrain.parallel.mesh import Mesh

log = get_logger(__name__)


def load_start(
    model: Bert | BertPipeline,
    config: RunConfig,
    tokenizer: TokenizerInfo,
    mesh: Mesh,
    device: torch.device,
    allowed: Sequence[str] = (),
) -> None:
    """Set the weights of `model` from `run.init_from`, if they belong to this configuration and tokenizer; collective.

    Args:
        tokenizer: of the run's data.
        allowed: keys that may differ although the weights then mean something else: of the model section where
            shapes stay the same, and `data.train` for another tokenizer of as many pieces.

    Raises:
        ConfigError: there is no checkpoint there, or a key or the tokenizer differs; with both values and the remedy.
        CheckpointError: it is damaged.
    """
    path = config.run.init_from
    assert path is not None  # the caller asks for it
    folder = ask_rank_0(lambda: find_start(path))
    try:
        verify_together(folder)
    except CheckpointError as error:
        raise CheckpointError(f"run.init_from {path}: {error}; name another step-NNNNNNN folder") from None
    notes = ask_rank_0(lambda: check_start(folder, config, tokenizer, allowed))
    num_tensors = load_weights_into(model, folder, mesh, device)
    manifest = CheckpointManifest.load(folder)
    log.info(
        "run.init_from %s: the run starts from the weights of %s (%s tensors, kind %s, step %s), with a new optimizer",
        path,
        folder,
        num_tensors,
        manifest.kind,
        f"{manifest.step:,}",
    )
    for note in notes:
        log.warning("run.init_from %s: %s", path, note)


def find_start(path: Path) -> Path:
    """The checkpoint folder that `run.init_from` names: itself, or the newest in a run's folder.

    Raises:
        ConfigError: there is none; says what is there instead.
        CheckpointError: a folder cannot be read.
    """
    name = f"run.init_from {path}"
    try:
        is_there = path.exists()
    except OSError as error:
        raise CheckpointError(f"{name}: cannot be read: {error.strerror}") from None
    if not is_there:
        raise ConfigError(f"{name}: is not there; give a checkpoint, a run's folder or what `taco import-hf` wrote")
    if path.is_file():
        raise ConfigError(f"{name}: is a file; give the folder of a checkpoint (`taco import-hf` makes one)")
    try:
        return find_checkpoint(path)
    except CheckpointError as error:
        if (path / "config.json").exists():
            raise ConfigError(
                f"{name}: is a Hugging Face folder; make a checkpoint of it with `taco import-hf {path} "
                f"imported/{path.resolve().name}` and name that"
            ) from None
        raise ConfigError(f"run.init_from {error}") from None


def check_start(folder: Path, config: RunConfig, tokenizer: TokenizerInfo, allowed: Sequence[str] = ()) -> list[str]:
    """Compare a checkpoint folder with a run that is to start from it; returns what a person should know.

    Raises:
        ConfigError: a key of the model section or the tokenizer differs; all of them are named.
        TacoError: the manifest or a tokenizer is damaged.
    """
    manifest = CheckpointManifest.load(folder)
    name = f"run.init_from {config.run.init_from}"
    different = compare_models(manifest.model, config.model)
    if refused := explain_refused(different, allowed):
        raise ConfigError(f"{name}: its weights belong to another model: {refused}")
    notes = [
        f"model.{key} is {there!r} in the checkpoint and {here!r} in this run, as allowed"
        for key, (there, here) in different.items()
    ]
    other = compare_tokenizers(folder, manifest, tokenizer, config.data.train[0])
    problem, note = _explain_tokenizers(other, may_differ=is_allowed("data", "train", allowed))
    if problem is not None:
        raise ConfigError(f"{name}: {problem}")
    return [*notes, *([note] if note else [])]


def _explain_tokenizers(other: OtherTokenizer | None, *, may_differ: bool) -> tuple[str | None, str | None]:
    """A problem that ends the run, or a note for a person."""
    if other is None:
        return None, None
    if other.is_unknown:
        return None, f"{other.text}; to be sure, {other.remedy}"
    if other.has_same_size and may_differ:
        return None, f"{other.text}, as allowed"
    on_purpose = " (if pieces were replaced on purpose: --allow-change data.train)" if other.has_same_size else ""
    return f"{other.text}; {other.remedy}{on_purpose}", None
