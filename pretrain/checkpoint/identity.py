"""Whether a checkpoint is one of this run: its folder's name, its manifest and the run's own name must agree."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import yaml

from pretrain.checkpoint.manifest import CheckpointManifest, step_folder, step_named
from pretrain.checkpoint.run_record import ALLOWS_OTHER_RUN
from pretrain.config.sections import RunConfig
from pretrain.errors import CheckpointError, ConfigError
from pretrain.run_folder import refused_changes
from pretrain.runlog import get_logger

CONFIG_FILE = "config.yaml"  # of a run, and in every checkpoint
_MOST_CHANGES = 5

log = get_logger(__name__)


def check_identity(
    folder: Path,
    manifest: CheckpointManifest,
    expected: CheckpointManifest,
    config: RunConfig,
    allowed: Collection[str],
) -> None:
    """Refuse a checkpoint folder that was renamed, or copied in from another run, seed or configuration.

    Args:
        manifest: of the folder, which is verified.
        expected: what this run writes, with its `run_id`.
        allowed: `checkpoint.run` in it turns the refusal into a line in the log; other keys may have changed.

    Raises:
        CheckpointError: with both values and what to do.
    """
    if manifest.kind != "training":
        raise CheckpointError(
            f"{folder}: holds weights only and cannot be continued; move it out of {folder.parent}, and start another "
            f"run from it with run.init_from={folder}"
        )
    problem = _find_misnomer(folder, manifest) or _find_other_run(folder, manifest, expected, config, allowed)
    if problem is None:
        return
    if ALLOWS_OTHER_RUN not in allowed:
        raise CheckpointError(f"{problem}, or continue from it with --allow-change {ALLOWS_OTHER_RUN}")
    log.warning("continuing all the same, as allowed (--allow-change %s): %s", ALLOWS_OTHER_RUN, problem)


def check_configuration(
    folder: Path,
    manifest: CheckpointManifest,
    expected: CheckpointManifest,
    config: RunConfig,
    allowed: Collection[str],
) -> None:
    """Compare with the checkpoint's configuration if the run has none, as where `checkpoints/` alone was copied.

    Arguments as for `check_identity`.

    Raises:
        ConfigError: with every key that changes what is trained.
    """
    path = folder.parent.parent / CONFIG_FILE
    if path.exists() or manifest.run_id != expected.run_id:
        return  # `RunFolder.check_config` compared with that, or `check_identity` with the other run's
    if changes := _find_changes(folder, manifest, config, allowed):
        listing = "\n".join(f"  - {text}" for text in changes)
        raise ConfigError(
            f"{folder}: was trained with another configuration, and there is no {path}\n{listing}\n"
            "undo the changes, or add --allow-change KEY for each of them"
        )


def _find_misnomer(folder: Path, manifest: CheckpointManifest) -> str | None:
    right = step_folder(folder.parent, manifest.step)
    if folder.name == right.name:
        return None
    return (
        f"{folder}: is named step {step_named(folder)}, and its manifest says step {manifest.step}; rename it to "
        f"{right.name} or move it out of {folder.parent}"
    )


def _find_other_run(
    folder: Path,
    manifest: CheckpointManifest,
    expected: CheckpointManifest,
    config: RunConfig,
    allowed: Collection[str],
) -> str | None:
    if manifest.run_id == expected.run_id:
        return None
    changes = _find_changes(folder, manifest, config, allowed)
    if not manifest.run_id and not changes:  # of a release that gave runs no name
        return None
    differences = f" ({'; '.join(changes[:_MOST_CHANGES])})" if changes else ""
    return (
        f"{folder}: was saved by another run, {manifest.run_id or 'without a name'}, than this one, "
        f"{expected.run_id}{differences}; move it out of {folder.parent}"
    )


def _find_changes(folder: Path, manifest: CheckpointManifest, config: RunConfig, allowed: Collection[str]) -> list[str]:
    """Keys of the configuration in the checkpoint that change what is trained, and differ from the run's."""
    path = folder / CONFIG_FILE
    if path.name not in {record.name for record in manifest.files}:
        return []
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        return refused_changes(tree, config, allowed) if isinstance(tree, dict) else []
    except (OSError, yaml.YAMLError, ConfigError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
