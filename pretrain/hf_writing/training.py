"""What the run of a checkpoint trained, as far as the checkpoint itself says it; nothing is guessed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pretrain.checkpoint.manifest import CheckpointManifest


@dataclass(frozen=True)
class Training:
    """The training that a checkpoint has had in this project.

    Attributes:
        steps: optimizer steps; 0 for weights that were imported or only initialised.
        rows: training rows seen.
        seq_length: tokens per row, None if nothing says it.
        start: the checkpoint that the run started from (`run.init_from`), None if weights were drawn.
        is_imported: the weights come from elsewhere and no run has changed them.
        has_contrast: whether the contrastive loss took part.
    """

    steps: int
    rows: int
    seq_length: int | None
    start: str | None
    is_imported: bool
    has_contrast: bool

    @property
    def is_trained(self) -> bool:
        """Whether any step was taken."""
        return self.steps > 0 and self.rows > 0

    def trained_positions(self, max_positions: int) -> int | None:
        """How many positions, from the first, were in training rows; None if that is unknown here."""
        if not self.is_trained or self.seq_length is None:
            return None
        return min(self.seq_length, max_positions)


def read_training(checkpoint: Path, manifest: CheckpointManifest) -> Training:
    """What a verified checkpoint says of its training: its manifest, and the configuration of its run."""
    config = _read_config(checkpoint, manifest)
    seq_length = _get(config, "data", "seq_length")
    start = _get(config, "run", "init_from")
    weight = _get(config, "objective", "contrastive_weight")
    return Training(
        steps=manifest.step,
        rows=manifest.consumed_samples,
        seq_length=seq_length if isinstance(seq_length, int) else None,
        start=str(start) if start else None,
        is_imported=not config and not manifest.data and manifest.step == 0,
        has_contrast=weight is None or bool(weight),
    )


def _read_config(checkpoint: Path, manifest: CheckpointManifest) -> Mapping[str, Any]:
    """The run's configuration in the checkpoint; empty if there is none, as in an import."""
    name = "config.yaml"
    if name not in {record.name for record in manifest.files}:
        return {}
    try:
        tree = yaml.safe_load((checkpoint / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # another release's; the export does not need it
        return {}
    return tree if isinstance(tree, dict) else {}


def _get(config: Mapping[str, Any], section: str, key: str) -> Any:
    values = config.get(section)
    return values.get(key) if isinstance(values, dict) else None
