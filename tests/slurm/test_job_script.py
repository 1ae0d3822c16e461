"""The job script on a real SLURM of two nodes, brought up on this machine by `local_slurm.sh`.

Needs root and SLURM's packages (`tests/slurm/local_slurm.sh install`); skips itself with the reason otherwise.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_runs import write_cyclic_dataset, write_small_run

from pretrain.checkpoint import CheckpointManifest, find_checkpoint
from pretrain.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "slurm" / "taco_large.sh"
CLUSTER = Path(__file__).with_name("local_slurm.sh")
FINISHED = {"COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT"}

Environment = dict[str, str]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """Variables with which SLURM's clients talk to a running cluster of two nodes."""
    if os.geteuid() != 0:
        pytest.skip("a local SLURM cluster needs root")
    if shutil.which("slurmctld", path="/usr/sbin:/usr/bin") is None:
        pytest.skip("SLURM is not installed; tests/slurm/local_slurm.sh install")
    environment = {**os.environ, "LOCAL_SLURM_DIR": str(tmp_path_factory.mktemp("slurm"))}
    up = subprocess.run([CLUSTER, "up", "2"], env=environment, capture_output=True, text=True, timeout=120, check=False)
    try:
        if up.returncode:
            pytest.skip(f"no local SLURM cluster here: {up.stderr.strip()[-300:]}")
        answer = subprocess.run([CLUSTER, "env"], env=environment, capture_output=True, text=True, check=True)
        command = f"{answer.stdout}\nenv -0"
        found = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=True)
        yield dict(line.split("=", 1) for line in found.stdout.split("\0") if "=" in line)
    finally:
        subprocess.run([CLUSTER, "down"], env=environment, capture_output=True, timeout=120, check=False)


def submit(environment: Environment, folder: Path, config: Path, *overrides: str, gpus: int | None = None) -> str:
    """Submit the script on two nodes of two processes each; the job's last state.

    With `gpus` per node the script counts the processes by itself, otherwise they are set in the environment.
    """
    settings = {"TACO_CONFIG": str(config), "TACO_PYTHON": sys.executable}
    command = ["sbatch", "--parsable", "--nodes=2", f"--output={folder}/%x-%j.log"]
    if gpus is None:
        settings["TACO_PROCESSES_PER_NODE"] = "2"
    else:
        command.append(f"--gpus-per-node={gpus}")
    command += [str(SCRIPT), *overrides]
    job = subprocess.run(
        command, env={**environment, **settings}, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout.strip()
    end = time.monotonic() + 240
    while time.monotonic() < end:
        record = subprocess.run(
            ["scontrol", "-o", "show", "job", job], env=environment, capture_output=True, text=True, check=True
        ).stdout
        (state,) = re.findall(r"JobState=(\w+)", record)
        if state in FINISHED:
            return state
        time.sleep(0.5)
    raise AssertionError(f"job {job} did not end: {record}\n{logs(folder)}")


def logs(folder: Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in folder.glob("*.log"))


def test_the_script_is_valid_bash() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)


@pytest.mark.slow
def test_two_nodes_train_and_a_second_job_continues(cluster: Environment, tmp_path: Path) -> None:
    config = write_small_run(tmp_path, train__steps=6)
    assert submit(cluster, tmp_path, config) == "COMPLETED", logs(tmp_path)
    manifest = CheckpointManifest.load(find_checkpoint(tmp_path / "run"))
    assert (manifest.step, manifest.layout.data) == (6, 4)
    assert submit(cluster, tmp_path, config, "train.steps=8", "--allow-change=train.steps") == "COMPLETED"
    assert "continuing from" in logs(tmp_path)
    assert [r["step"] for r in read_metrics(tmp_path / "run") if "loss" in r] == list(range(1, 9))


@pytest.mark.slow
def test_a_configuration_that_does_not_fit_fails_the_job_on_every_node(cluster: Environment, tmp_path: Path) -> None:
    config = write_small_run(tmp_path)
    assert submit(cluster, tmp_path, config, "train.global_batch_size=20") == "FAILED"
    assert "x data-parallel size (4) = 16; try 16" in logs(tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_overrides_with_shell_characters_reach_the_program_untouched(cluster: Environment, tmp_path: Path) -> None:
    config = write_small_run(tmp_path, train__steps=2, optim__warmup_steps=1)
    folder = f"{tmp_path}/run $(touch {tmp_path}/canary) `id` ; two"
    assert submit(cluster, tmp_path, config, f'run.output_dir="{folder}"') == "COMPLETED", logs(tmp_path)
    assert (Path(folder) / "checkpoints" / "step-0000002").is_dir()
    assert not (tmp_path / "canary").exists()


@pytest.mark.slow
def test_tensor_and_pipeline_parallel_over_two_nodes_one_process_per_gpu(cluster: Environment, tmp_path: Path) -> None:
    data = tmp_path / "two words"
    data.mkdir()
    write_cyclic_dataset(data / "train", num_documents=100)
    write_cyclic_dataset(data / "validation", num_documents=40, seed=1)
    run = tmp_path / "run; $(touch canary)"
    overrides = [f'data.{name}=["{data}/{name}"]' for name in ("train", "validation")]
    overrides += [f'run.output_dir="{run}"', "run.device=cpu", "train.steps=4", "optim.warmup_steps=1"]
    overrides += ["train.log_every=1", "parallel={tensor: 2, pipeline: 2, data: 1}"]
    config = ROOT / "configs" / "taco_tiny.yaml"
    assert submit(cluster, tmp_path, config, *overrides, gpus=2) == "COMPLETED", logs(tmp_path)
    layout = CheckpointManifest.load(find_checkpoint(run)).layout
    assert (layout.data, layout.tensor, layout.pipeline) == (1, 2, 2)
    records = [record for record in read_metrics(run) if "loss" in record]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all(record["contrastive_loss"] > 0 for record in records)
    assert len(list((run / "logs").iterdir())) == 4
    assert not list(ROOT.glob("canary")) + list(tmp_path.rglob("canary"))
