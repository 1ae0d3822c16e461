"""One run, one folder: locks, strangers, changed configurations."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from project import ROOT
from reading_rights import unreadable

from pretrain import run_folder
from pretrain.config.sections import RunConfig
from pretrain.errors import ConfigError, TacoError
from pretrain.run_folder import RunFolder, describe_environment


def config(folder: Path, **sections: object) -> RunConfig:
    return RunConfig.model_validate({"run": {"output_dir": str(folder)}, "data": {"train": ["x"]}, **sections})


def started(folder: Path, **sections: object) -> RunFolder:
    run = RunFolder(folder)
    run.claim()
    run.write_description(config(folder, **sections), {"zero": 1}, describe_environment(1, "cpu"))
    return run


@pytest.mark.fault("two-runs")
def test_second_run_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    first = started(tmp_path / "run")
    with pytest.raises(TacoError, match=f"in use by host .*, process {os.getpid()}"):
        RunFolder(tmp_path / "run").claim()
    first.release()
    RunFolder(tmp_path / "run").claim()


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"holds thesis.tex .* no run"):
        RunFolder(tmp_path).claim()
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder(tmp_path / "run").claim()


def test_the_same_configuration_continues(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    assert run.check_config(config(tmp_path / "run")) == []


@pytest.mark.fault("changed-run")
def test_another_configuration_is_refused_with_the_difference(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    changed = config(tmp_path / "run", optim={"lr": 0.5}, data={"train": ["y"]})
    with pytest.raises(ConfigError) as caught:
        run.check_config(changed)
    assert "optim.lr: 0.0001 -> 0.5" in str(caught.value)
    assert "data.train: ['x'] -> ['y']" in str(caught.value)


def test_allowed_and_harmless_changes_are_told(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    changed = config(tmp_path / "run", optim={"lr": 0.5}, train={"log_every": 3})
    assert run.check_config(changed, allowed=["optim.lr"]) == ["optim.lr: 0.0001 -> 0.5", "train.log_every: 10 -> 3"]


def test_allowing_a_key_frees_no_other_that_begins_like_it(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    changed = config(tmp_path / "run", optim={"lr": 0.5})
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        run.check_config(changed, allowed=["opt", "optim.l"])
    assert run.check_config(changed, allowed=["optim"])


def test_a_run_of_a_version_without_a_key_had_its_default(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    old = yaml.safe_load(path.read_text())
    del old["train"]["compile"], old["fp16"]
    path.write_text(yaml.safe_dump(old))
    assert run.check_config(config(tmp_path / "run")) == []
    with pytest.raises(ConfigError, match=r"train\.compile: 'off' -> 'layers'"):
        run.check_config(config(tmp_path / "run", train={"compile": True}))


def test_everything_about_zero_may_change(tmp_path: Path) -> None:
    """A checkpoint knows no layout and no order of DeepSpeed's buffers."""
    run = started(tmp_path / "run")
    changed = config(tmp_path / "run", zero={"stage": 2, "round_robin_gradients": True})
    assert run.check_config(changed) == ["zero.round_robin_gradients: false -> true", "zero.stage: 1 -> 2"]


def test_configuration_and_environment_are_saved_with_the_run(tmp_path: Path) -> None:
    started(tmp_path / "run")
    environment = json.loads((tmp_path / "run" / "env.json").read_text())
    assert environment["packages"]["torch"]
    assert environment["command"]
    assert json.loads((tmp_path / "run" / "ds_config.json").read_text()) == {"zero": 1}


def test_the_mark_of_a_finished_run_names_its_step_and_can_be_taken_away(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    run.mark_done(8)
    assert json.loads((tmp_path / "run" / "done.json").read_text())["step"] == 8
    run.clear_done()
    run.clear_done()
    assert not (tmp_path / "run" / "done.json").exists()


def test_a_folder_that_a_job_script_has_begun_is_free(tmp_path: Path) -> None:
    (tmp_path / "run" / "slurm").mkdir(parents=True)
    run = RunFolder(tmp_path / "run")
    run.check_free(config(tmp_path / "run"))
    run.claim()
    with pytest.raises(ConfigError, match="in use by host"):
        RunFolder(tmp_path / "run").check_free(config(tmp_path / "run"))


def test_only_a_clone_of_this_project_tells_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed into somebody's repository, or copied into it, the code has no revision: theirs says nothing of it."""
    repository, code = tmp_path / "thesis", "pretrain/run_folder.py"
    git = ["git", "-C", str(repository), "-c", "user.name=x", "-c", "user.email=x@y"]
    for folder in (".venv", "vendor", "."):
        (repository / folder / "pretrain").mkdir(parents=True)
        (repository / folder / code).write_text("")
    (repository / "vendor" / "pyproject.toml").touch()
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "--force", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message=begin"], check=True)
    monkeypatch.setenv("GIT_DIR", str(ROOT / ".git"))  # as in a hook of another repository
    for folder in (".venv", "vendor"):
        monkeypatch.setattr(run_folder, "__file__", str(repository / folder / code))
        assert describe_environment(1, "cpu")["revision"] is None
    (repository / "pyproject.toml").touch()
    monkeypatch.setattr(run_folder, "__file__", str(repository / code))
    revision = describe_environment(1, "cpu")["revision"]
    assert re.fullmatch("[0-9a-f]{12}", revision)
    (repository / code).write_text("changed")
    assert describe_environment(1, "cpu")["revision"] == f"{revision}-dirty"


def test_the_tokenizer_of_a_run_is_that_of_its_data(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    files = {"vocab.txt": b"[PAD]", "tokenizer.json": b"{}"}

    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in run.tokenizer.iterdir()}

    assert run.keep_tokenizer(files) is False
    assert run.keep_tokenizer(files) is False
    for name in files:  # damaged by hand, then another vocabulary, then something beside it
        (run.tokenizer / name).write_bytes(b"other")
        assert run.keep_tokenizer(files) is True
        assert content() == files
    (run.tokenizer / "stray").touch()
    assert run.keep_tokenizer(files) is True
    assert content() == files
    assert not list(run.path.glob(".tokenizer*"))


@pytest.mark.fault("unreadable")
def test_what_may_not_be_read_is_told_in_one_line(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    run.release()
    with (
        unreadable(run.path),
        pytest.raises(TacoError, match=rf"^run.output_dir {run.path}: cannot be read: Permission"),
    ):
        run.check_free(config(run.path))
    path = run.path / "config.yaml"
    with unreadable(path), pytest.raises(TacoError, match=rf"^{path}: cannot be read: Permission denied$"):
        run.check_config(config(run.path))
    with unreadable(run.path / "run.lock"), pytest.raises(TacoError, match=r"Permission denied.*run\.lock"):
        run.check_free(config(run.path))
