"""Parts of a corpus preprocessed by a job array on a real SLURM, interrupted, requeued, and merged.

Needs root and SLURM's packages (`tests/slurm/local_slurm.sh install`); skips itself with the reason otherwise.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import ROOT, running_cluster

SCRIPT = ROOT / "slurm" / "preprocess.sh"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "mat"]

Environment = dict[str, str]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """Variables with which SLURM's clients talk to a running cluster of two nodes."""
    with running_cluster(tmp_path_factory.mktemp("slurm"), 2, "data") as found:
        yield found.environment


def submit(environment: Environment, folder: Path, array: str, *arguments: object) -> str:
    """Submits the script; the array's job number."""
    command = ["sbatch", "--parsable", f"--array={array}", "--mem=1G", f"--output={folder}/%x-%A_%a.log"]
    settings = {"TACO_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    command += ["--cpus-per-task=1", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(
        command, env={**environment, **settings}, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout.strip()


def states(environment: Environment, job: str) -> list[str]:
    record = subprocess.run(
        ["scontrol", "-o", "show", "job", job], env=environment, capture_output=True, text=True, check=True
    ).stdout
    return re.findall(r"JobState=(\w+)", record)


def wait_for_end(environment: Environment, folder: Path, job: str) -> list[str]:
    end = time.monotonic() + 200
    while time.monotonic() < end:
        found = states(environment, job)
        if all(state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL") for state in found):
            return found
        time.sleep(0.5)
    raise AssertionError(f"job {job} did not end: {states(environment, job)}\n{logs(folder)}")


def logs(folder: Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in sorted(folder.glob("*.log")))


def run_taco(*words: object) -> None:
    command = [sys.executable, "-m", "pretrain.cli", *map(str, words)]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True, timeout=120)


def write_corpus(folder: Path, count: int, *, copies: int = 1) -> list[object]:
    maker = random.Random(3)
    texts = [" ".join(maker.choices(WORDS[5:], k=400)) for _ in range(count)]
    (folder / "a b.txt").write_text("\n\n".join(texts * copies))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return ["--input", folder / "a b.txt", "--tokenizer", folder / "vocab.txt"]


def test_the_script_is_valid_bash() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("shellcheck is not installed")
    subprocess.run([shellcheck, SCRIPT], check=True)


@pytest.mark.parametrize(
    ("variables", "arguments", "words"),
    [
        ({}, [], "not a job array"),
        ({"ID": "1", "COUNT": "2", "MIN": "1", "MAX": "2"}, [], "--array must be 0 to N-1"),
        ({"ID": "0", "COUNT": "2", "MIN": "0", "MAX": "5"}, [], "--array must be 0 to N-1"),
        ({"ID": "0", "COUNT": "1", "MIN": "0", "MAX": "0"}, ["--shard", "0/2"], "given by the job array"),
        ({"ID": "0", "COUNT": "1", "MIN": "0", "MAX": "0"}, ["--input", "x"], "--output-prefix is missing"),
        ({"ID": "0", "COUNT": "1", "MIN": "0", "MAX": "0"}, ["--output-prefix"], "--output-prefix needs a value"),
    ],
)
def test_mistakes_are_said_before_any_work(
    tmp_path: Path, variables: Environment, arguments: list[str], words: str
) -> None:
    environment = {f"SLURM_ARRAY_TASK_{name}": value for name, value in variables.items()}
    environment |= {"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = subprocess.run([SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("shell")
@pytest.mark.slow
def test_parts_are_made_interrupted_requeued_and_merged(cluster: Environment, tmp_path: Path) -> None:
    source = write_corpus(tmp_path, 8000, copies=16)  # enough for a signal to come in time
    prefix = tmp_path / "out $(touch canary); x" / "train"
    prefix.parent.mkdir()
    job = submit(cluster, tmp_path, "0-2", *source, "--output-prefix", prefix, "--journal-seconds", 0)
    journal = Path(f"{prefix}.part-00000-of-00003.journal")
    end = time.monotonic() + 90
    while not journal.exists():  # the first part is under way: end it as a time limit would
        assert time.monotonic() < end, logs(tmp_path)
        assert not Path(f"{prefix}.part-00000-of-00003.json").exists(), "too small a corpus"
        time.sleep(0.02)
    subprocess.run(["scancel", "--batch", "--signal=TERM", f"{job}_0"], env=cluster, check=True, timeout=60)
    assert set(wait_for_end(cluster, tmp_path, job)) == {"COMPLETED"}, logs(tmp_path)
    first = (tmp_path / f"taco_preprocess-{job}_0.log").read_text()
    assert "stopped by SIGTERM" in first
    assert "continuing an unfinished run" in first
    merge = re.findall(r"when all parts are there: (.*)", first)[-1]
    subprocess.run(["bash", "-c", merge], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=60)
    merged = {suffix: Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx", ".json")}
    run_taco("data", "preprocess", *source, "--output-prefix", prefix, "--overwrite")
    assert {suffix: Path(f"{prefix}{suffix}").read_bytes() for suffix in merged} == merged
    again = submit(cluster, tmp_path, "0-2", *source, "--output-prefix", prefix)
    assert set(wait_for_end(cluster, tmp_path, again)) == {"COMPLETED"}
    assert logs(tmp_path).count("is there already") == 3
    assert not list(tmp_path.rglob("canary"))
    assert not (ROOT / "canary").exists()
