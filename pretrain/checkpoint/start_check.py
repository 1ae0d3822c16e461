"""Whether a run can start from the checkpoint in `run.init_from`: compared by key, before torch or a tensor is loaded.

Shapes alone do not show that weights fit. Other heads, another epsilon or another vocabulary of the same size give a
model that loads, and computes something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pretrain.checkpoint.manifest import CheckpointManifest, list_checkpoints
from pretrain.checkpoint.models import compare_models, explain_refused, is_allowed
from pretrain.checkpoint.run_record import find_own_checkpoint
from pretrain.checkpoint.tokenizers import OtherTokenizer, compare_tokenizers
from pretrain.config.sections import RunConfig
from pretrain.data.tokenizer.info import TokenizerInfo
from pretrain.errors import CheckpointError, ConfigError, TacoError


def find_problems_of_start(config: RunConfig, tokenizer: TokenizerInfo | None, allowed: Sequence[str]) -> list[str]:
    """Why a run cannot start from `run.init_from`, for a dry run; empty if it can, or does not read it.

    That it is not on this machine is no reason; `tokenizer` and `allowed` are those of `check_start`.
    """
    path = config.run.init_from
    try:
        if path is None or not path.exists() or list_checkpoints(config.run.output_dir / "checkpoints"):
            return []
        check_start(find_start(path), config, tokenizer, allowed)
    except (TacoError, OSError) as error:
        return [str(error)]
    return []


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
        return find_own_checkpoint(path)
    except CheckpointError as error:
        if (path / "config.json").exists():
            raise ConfigError(
                f"{name}: is a Hugging Face folder; make a checkpoint of it with `taco import-hf {path} "
                f"imported/{path.resolve().name}` and name that"
            ) from None
        raise ConfigError(f"run.init_from {error}") from None


def check_start(
    folder: Path, config: RunConfig, tokenizer: TokenizerInfo | None, allowed: Sequence[str] = ()
) -> list[str]:
    """Compare a checkpoint folder with a run that is to start from it; returns what a person should know.

    Args:
        tokenizer: of the run's data; None where the data is not here, and nothing can be said about it.

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
    if tokenizer is None:
        return notes
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
