"""Files that older releases wrote are read as they were, and a run that one of them began is continued."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from forked import run_ranks
from project import ROOT
from safetensors.torch import load_file
from typer.testing import CliRunner

from data_tools import build_index
from pretrain.checkpoint.manifest import CheckpointManifest, find_problems
from pretrain.checkpoint.weights import read_weights
from pretrain.cli import run_program
from pretrain.config.load import load_config
from pretrain.data.dataset.verification import verify
from pretrain.errors import ConfigError
from pretrain.metrics import read_metrics
from pretrain.run_folder import RunFolder
from pretrain.train import app

RELEASES = sorted((ROOT / "tests" / "fixtures").glob("run-*"))
TOLERANCE = 1e-5  # the files were written on another processor


@pytest.fixture(params=RELEASES, ids=lambda folder: folder.name)
def old(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files of a release, and the working directory."""
    folder = tmp_path / "old"
    shutil.copytree(request.param, folder)
    monkeypatch.chdir(folder)
    return folder


def test_there_are_files_of_a_release() -> None:
    assert [folder.name for folder in RELEASES] == ["run-0.1.0"]


def test_datasets_are_sound(old: Path) -> None:
    assert verify("train") == []
    assert verify("validation") == []


def test_an_index_is_not_built_again(old: Path) -> None:
    (index,) = Path("train.index").glob("pack-*.index")
    before = (index.read_bytes(), index.stat().st_mtime_ns)
    result = CliRunner().invoke(build_index.app, ["train", "--row-mode", "pack", "--seq-length", "24"])
    assert result.exit_code == 0, result.output
    assert [path.name for path in Path("train.index").glob("*.index")] == [index.name]
    assert (index.read_bytes(), index.stat().st_mtime_ns) == before


def test_a_checkpoint_is_sound_and_its_weights_are_read(old: Path) -> None:
    folder = Path("run/checkpoints/step-0000002")
    assert find_problems(folder) == []
    assert CheckpointManifest.load(folder).consumed_samples == 32
    assert sum(tensor.numel() for tensor in read_weights(folder).values()) == 4192


def continue_run(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        run_program(app, ["--config", "run.yaml", *arguments])
    return ended.value.code


def continue_without_dropout() -> int | str | None:
    keys = ("model.hidden_dropout", "model.attention_dropout")
    return continue_run(*(f"{key}=0.0" for key in keys), *(f"--allow-change={key}" for key in keys))


def difference(expected: str) -> float:
    """The largest difference between the state after four steps and a file of the release."""
    folders = (Path("run/checkpoints/step-0000004"), Path(expected))
    ours, theirs = (load_file(folder / "state" / "rank-00000.safetensors") for folder in folders)
    assert ours.keys() == theirs.keys()
    counters = [(folder / "state" / "counters.json").read_bytes() for folder in folders]
    assert counters[0] == counters[1]
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def test_a_run_without_the_key_keeps_the_mean_of_micro_batches(old: Path) -> None:
    run, config = RunFolder(Path("run")), load_config(Path("run.yaml"))
    assert config.mlm.average == "token"
    assert run.check_config(config) == []
    assert run.keep_average(config).mlm.average == "micro_batch"
    assert "average: micro_batch" in CliRunner().invoke(app, ["--config", "run.yaml", "--dry-run"]).output
    given = load_config(Path("run.yaml"), ["mlm.average=token"])
    assert run.keep_average(given).mlm.average == "token"
    with pytest.raises(ConfigError, match=r"mlm\.average: 'micro_batch' -> 'token'"):
        run.check_config(given)
    assert run.check_config(given, allowed=["mlm.average"]) == ["mlm.average: 'micro_batch' -> 'token'"]


@pytest.mark.slow
def test_a_run_is_continued_to_the_state_that_its_release_reached(old: Path) -> None:
    assert run_ranks(1, continue_without_dropout) == [0]
    assert [record["step"] for record in read_metrics(Path("run")) if "loss" in record] == [1, 2, 3, 4]
    assert "average: micro_batch" in Path("run/config.yaml").read_text()
    assert difference("expected-without-dropout") < TOLERANCE


@pytest.mark.slow
def test_a_run_goes_on_with_dropout_whose_units_are_others(old: Path) -> None:
    """Dropout was seeded place by place, and is counted now: the run goes on, by other units."""
    assert run_ranks(1, continue_run) == [0]
    assert TOLERANCE < difference("expected") < 1.0  # second moments, too
