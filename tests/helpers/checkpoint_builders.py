"""Small checkpoints for tests: a manifest, state files of two ranks, and what lies in a folder."""

from __future__ import annotations

import json
import random
from pathlib import Path

from pretrain.checkpoint.manifest import CheckpointManifest, Layout
from pretrain.durable import FileRecord, hashing_writer

LAYOUT = Layout(data=1, tensor=1, pipeline=1, zero_stage=1, precision="fp32")


def manifest(step: int) -> CheckpointManifest:
    return CheckpointManifest(
        kind="training",
        step=step,
        consumed_samples=16 * step,
        layout=LAYOUT,
        model={"num_layers": 2},
        vocab_size=64,
        tokenizer_sha256="ab",
        config_sha256="cd",
        pad_token_id=0,
    )


def write_state(folder: Path) -> list[FileRecord]:
    (folder / "state").mkdir()
    records = []
    for name in ("state/rank-00000.safetensors", "state/rank-00001.safetensors"):
        with hashing_writer(folder / name) as file:
            file.write(random.Random(name).randbytes(5000))
        records.append(FileRecord(name, file.num_bytes, file.hexdigest()))
    return records


def every_file(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")


def is_unchanged(flipped: bytearray, content: bytes) -> bool:
    """Whether a flip turned one blank into another, which JSON ignores."""
    try:
        return bool(json.loads(flipped) == json.loads(content))
    except ValueError:
        return False
