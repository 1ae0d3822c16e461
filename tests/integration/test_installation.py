"""An installed wheel works without the repository: with the packages of data work alone, and with all of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest
from linked_environment import Environment, build_wheel, make_environment
from project import ROOT, SAMPLE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TRAINING_MODULES = ["torch", "deepspeed", "megatron", "transformers", "safetensors", "tensorboard"]
# From text to datasets that are looked at; everything is written into the current folder.
LEARN = "train-tokenizer --input CORPUS"
ENCODE = "preprocess --input CORPUS"
STEPS = (
    f"{LEARN} --output vocab.txt --kind wordpiece --vocab-size 2000 --hash-range 0:0.1",
    f"{LEARN} --output pieces.model --kind sentencepiece-bpe --vocab-size 500 --hash-range 0:0.02",
    f"{ENCODE} --tokenizer vocab.txt --output-prefix whole --hash-range 0:0.1 --workers 2",
    f"{ENCODE} --tokenizer vocab.txt --output-prefix part-0 --hash-range 0:0.1 --shard 0/2",
    f"{ENCODE} --tokenizer vocab.txt --output-prefix part-1 --hash-range 0:0.1 --shard 1/2",
    f"{ENCODE} --tokenizer pieces.model --output-prefix pieces --hash-range 0:0.02 --split-sentences",
    "merge merged part-0 part-1",
    "inspect merged --json",
    "inspect merged --row 3 --row-mode stream --seq-length 64 objective.contrastive_weight=0 --json",
    "verify merged whole pieces --json",
    "index merged --row-mode pack --seq-length 128 --json",
    "stats merged --plot merged.png --json",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def data_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    lines = (ROOT / "requirements-data.txt").read_text().splitlines()
    requirements = [line for line in lines if line and not line.startswith("#")]
    return make_environment(tmp_path_factory.mktemp("data") / "venv", wheel, requirements)


@pytest.fixture(scope="module")
def full_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return make_environment(tmp_path_factory.mktemp("full") / "venv", wheel, requirements)


def results(environment: Environment, folder: Path) -> dict[str, bytes]:
    """Does the data work in `folder`: the content of all files, and the answers without durations."""
    folder.mkdir()
    answers = {}
    for step in STEPS:
        words = step.replace("CORPUS", os.path.relpath(SAMPLE, folder)).split()
        answer = environment.run("taco", "data", *words, cwd=folder)
        if "--json" in words:
            answers[step] = re.sub(r'"\w*seconds\w*": [0-9.e-]+', "", answer).encode()
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {**answers, **{path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}}


def test_data_work_without_the_training_stack_gives_the_same_bytes(
    data_environment: Environment, full_environment: Environment, tmp_path: Path
) -> None:
    assert data_environment.importable(*TRAINING_MODULES, "numpy", "tokenizers") == ["numpy", "tokenizers"]
    assert full_environment.importable(*TRAINING_MODULES) == TRAINING_MODULES
    without = results(data_environment, tmp_path / "without")
    assert {"merged.bin", "merged.idx", "merged.json", "pieces.bin", "vocab.txt", "merged.png"} <= set(without)
    assert without["merged.bin"] == without["whole.bin"]
    everything = results(full_environment, tmp_path / "everything")
    assert set(without) == set(everything)
    assert [name for name in without if without[name] != everything[name]] == []


def test_programs_started_by_path_run_without_the_training_stack(data_environment: Environment, tmp_path: Path) -> None:
    programs = [path for path in (ROOT / "data_tools").glob("*.py") if "run_program(app" in path.read_text()]
    assert len(programs) == 7
    for program in programs:
        assert "Example:" in data_environment.run("python", program, "--help", cwd=tmp_path)


def test_verbs_of_training_name_what_they_lack(data_environment: Environment, tmp_path: Path) -> None:
    ended = data_environment.try_run("taco", "fill-mask", "model", "[MASK]", cwd=tmp_path)
    python = data_environment.folder / "bin" / "python"
    words = rf"error: taco fill-mask needs the package torch, .*: {python} -m pip install 'torch[<>=,.\d]+'\n"
    assert re.fullmatch(words, ended.stderr), ended.stderr
    assert ended.returncode == 1


def test_the_wheel_holds_what_programs_read(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        modes = {entry.filename: entry.external_attr >> 16 for entry in archive.infolist()}
    project_files = [*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "slurm").glob("*.sh")]
    assert {f"pretrain/init/files/{path.relative_to(ROOT).as_posix()}" for path in project_files} <= set(modes)
    assert {"pretrain/init/project_readme.md", SAMPLE.relative_to(ROOT).as_posix()} <= set(modes)
    assert modes["pretrain/init/files/slurm/task.sh"] & 0o111
    assert {name.partition("/")[0] for name in modes if ".dist-info/" not in name} == {"pretrain", "data_tools"}


def test_an_installed_project_works_from_an_empty_folder(full_environment: Environment, tmp_path: Path) -> None:
    """The commands of the new project's README up to the dry run, and two steps of training, in a git repository."""
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    assert "init " in full_environment.run("taco", "--help", cwd=tmp_path)
    full_environment.run("taco", "init", "thesis", cwd=tmp_path)
    project = tmp_path / "thesis"
    commands = (project / "README.md").read_text().split("```")[1]
    assert "taco train --config configs/taco_tiny.yaml --dry-run" in commands
    assert "plan: 2 processes" in full_environment.run("bash", "-euc", commands, cwd=project)
    steps = ["train.steps=2", "parallel.data=1", "train.global_batch_size=32", "optim.warmup_steps=1"]
    full_environment.run("taco", "train", "--config", "configs/taco_tiny.yaml", *steps, cwd=project)
    run = project / "runs" / "quickstart" / "taco_tiny"
    assert json.loads((run / "done.json").read_text())["step"] == 2
    assert json.loads((run / "env.json").read_text())["revision"] is None
