"""A checkpoint is hashed once per use, however many ranks and steps of work the use has."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import run_ranks
from hf_folders import random_bert
from small_runs import write_small_run

from pretrain import durable
from pretrain.checkpoint.manifest import CheckpointManifest, find_checkpoint
from pretrain.checkpoint.reshape import reshape_checkpoint
from pretrain.cli import run_program
from pretrain.durable import FileRecord
from pretrain.import_hf import import_folder
from pretrain.train import app


def count_hashed(folder: Path) -> list[str]:
    """From now on, the names of the files below `folder` that this process hashes."""
    record_of, hashed = durable.record_of, []

    def counting(path: Path, root: Path) -> FileRecord:
        if path.is_relative_to(folder):
            hashed.append(path.name)
        return record_of(path, root)

    durable.record_of = counting
    return hashed


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A checkpoint of weights that fits the small run."""
    shape = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    import_folder(random_bert(tmp_path / "hf", **shape), tmp_path / "start")
    return find_checkpoint(tmp_path / "start")


def train_and_count(config: Path, weights: Path) -> list[str]:
    hashed = count_hashed(weights)
    with pytest.raises(SystemExit) as ended:
        run_program(app, ["--config", str(config), f"run.init_from={weights}"])
    assert ended.value.code == 0
    return hashed


@pytest.mark.slow
def test_ranks_share_the_hashing_of_the_weights_that_they_start_from(weights: Path, tmp_path: Path) -> None:
    config = write_small_run(tmp_path, train__steps=1, optim__warmup_steps=0)
    shares = run_ranks(2, train_and_count, config, weights)
    names = [Path(record.name).name for record in CheckpointManifest.load(weights).files]
    assert sorted(name for share in shares for name in share) == sorted(names)


def test_reshaping_to_weights_hashes_once(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "record_of", durable.record_of)  # restored afterwards
    hashed = count_hashed(weights)
    reshape_checkpoint(weights, tmp_path / "out", num_files=1, weights_only=True)
    names = [Path(record.name).name for record in CheckpointManifest.load(weights).files]
    assert sorted(hashed) == sorted(names)
