"""The job scripts on a real SLURM of four nodes on this machine: whole runs, and faults from outside that they survive.

What a run is worth after a fault is judged by bits: the state files of its last checkpoint are those of a run that
nobody disturbed. Needs root and SLURM's packages (`tests/slurm/local_slurm.sh install`); skips itself otherwise.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from job_faults import Fault, KilledRank, PowerLoss, Preemption, TimeLimitSignal, TimeLimitSignalUnderTorchrun, ranks_of
from slurm_cluster import LOCAL_SLURM, ROOT, Cluster, log_of, running_cluster
from small_runs import write_cyclic_dataset, write_small_run

from pretrain.checkpoint.manifest import CheckpointManifest, find_checkpoint
from pretrain.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SCRIPT = ROOT / "slurm" / "taco_large.sh"
# Enough steps that a fault comes in the middle, also on a fast machine.
STEPS, CHECKPOINT_EVERY, LOG_EVERY = 500, 50, 5
LONG_RUN: dict[str, Any] = {
    "train__steps": STEPS,
    "train__log_every": LOG_EVERY,
    "train__eval_every": 250,
    "checkpoint": {"every_steps": CHECKPOINT_EVERY},
}
# Two nodes of one process each; the checks before a run have tests of their own.
QUICK = {"TACO_PROCESSES_PER_NODE": "1", "TACO_PREFLIGHT": "off"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    # The ranks of a preempted job get time enough to save on a loaded machine.
    with running_cluster(
        tmp_path_factory.mktemp("slurm"), 4, LOCAL_SLURM_GRACE="40", LOCAL_SLURM_KILLWAIT="10"
    ) as found:
        yield found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """State of a run of two ranks outside SLURM that went through without a fault."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = write_small_run(folder, **LONG_RUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", "-m", "pretrain.train", "--config", str(config)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    return state_of(folder / "run")


def state_of(run: Path, step: int = STEPS) -> dict[str, str]:
    """Hashes of every state file of the newest checkpoint: weights, optimizer, counters."""
    manifest = CheckpointManifest.load(find_checkpoint(run))
    assert manifest.step == step
    return {record.name: record.xxh3_128 for record in manifest.files if record.name.startswith("state/")}


def has_reached(run: Path, step: int) -> bool:
    return any(record["step"] >= step for record in read_metrics(run))


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*_*.sh")) + [ROOT / "slurm" / "preprocess.sh"])
def test_slurm_accepts_every_script_as_it_stands(cluster: Cluster, script: Path) -> None:
    options = ["--array=0-3"] if script.stem == "preprocess" else []
    cluster.call("sbatch", "--test-only", *options, script)


@pytest.mark.fault("shell")
def test_two_nodes_train_after_a_preflight_and_a_second_job_continues(cluster: Cluster, tmp_path: Path) -> None:
    config = write_small_run(tmp_path, train__steps=6)
    run = tmp_path / f"run $(touch {tmp_path}/canary) `id` ; 'two"
    overrides = [f'run.output_dir="{run}"', "run.tensorboard=true"]
    settings = {"TACO_CONFIG": str(config), "TACO_PROCESSES_PER_NODE": "2"}
    job = cluster.submit(tmp_path, SCRIPT, *overrides, **settings)
    assert cluster.wait(job, tmp_path) == "COMPLETED", log_of(tmp_path, job)
    manifest = CheckpointManifest.load(find_checkpoint(run))
    assert (manifest.step, manifest.layout.data) == (6, 4)
    assert "preflight: 2 machines are well: taco" in log_of(tmp_path, job)
    assert "preflight: all-reduce over 4 ranks" in log_of(tmp_path, job)
    assert sorted(path.name for path in (run / "logs").iterdir()) == [f"rank_{rank:05d}.log" for rank in range(4)]
    assert "TORCH_FR_DUMP_TEMP_FILE=" in (run / "slurm" / f"{job}.0" / "environment").read_text()
    # More steps: the old mark is none. The other launcher: the same run.
    overrides += ["train.steps=8", "--allow-change=train.steps"]
    job = cluster.submit(
        tmp_path, SCRIPT, *overrides, **{**settings, "TACO_PREFLIGHT": "off", "TACO_LAUNCHER": "torchrun"}
    )
    assert cluster.wait(job, tmp_path) == "COMPLETED", log_of(tmp_path, job)
    assert "continuing from" in log_of(tmp_path, job)
    assert [record["step"] for record in read_metrics(run) if "loss" in record] == list(range(1, 9))
    assert not list(tmp_path.rglob("canary")) + list(ROOT.glob("canary"))


def test_tensor_and_pipeline_parallel_over_two_nodes_one_process_per_gpu(cluster: Cluster, tmp_path: Path) -> None:
    data = tmp_path / "two words"
    data.mkdir()
    write_cyclic_dataset(data / "train", num_documents=100)
    write_cyclic_dataset(data / "validation", num_documents=40, seed=1)
    run = tmp_path / "run"
    overrides = [f'data.{name}=["{data}/{name}"]' for name in ("train", "validation")]
    overrides += [f'run.output_dir="{run}"', "run.device=cpu", "train.steps=4", "optim.warmup_steps=1"]
    overrides += ["train.log_every=1", "parallel={tensor: 2, pipeline: 2, data: 1}"]
    settings = {"TACO_CONFIG": "configs/taco_tiny.yaml", "TACO_PREFLIGHT": "off"}
    job = cluster.submit(tmp_path, SCRIPT, *overrides, options=("--nodes=2", "--gpus-per-node=2"), **settings)
    assert cluster.wait(job, tmp_path) == "COMPLETED", log_of(tmp_path, job)
    layout = CheckpointManifest.load(find_checkpoint(run)).layout
    assert (layout.data, layout.tensor, layout.pipeline) == (1, 2, 2)
    records = [record for record in read_metrics(run) if "loss" in record]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all(record["contrastive_loss"] > 0 for record in records)


# -- faults that a run survives ----------------------------------------------------------------------------------------


def strike(fault: Fault, cluster: Cluster, job: str, config: Path) -> None:
    """Inject a fault after the next checkpoint, to which a kill must be able to go back, and wait for the new start."""
    folder, run = config.parent, config.parent / "run"
    restarts, wanted = int(cluster.show(job, "Restarts")), len(read_metrics(run)) + CHECKPOINT_EVERY // LOG_EVERY + 4
    cluster.wait_until(lambda: len(read_metrics(run)) >= wanted, job, folder, timeout=150)
    assert fault.inject(cluster, job, config)
    cluster.wait_until(lambda: int(cluster.show(job, "Restarts")) > restarts, job, folder, timeout=150)


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(
            (TimeLimitSignal(), KilledRank(), PowerLoss(), Preemption()),
            id="srun",
            marks=pytest.mark.fault("stop-signal", "kill", "node"),
        ),
        pytest.param(
            (TimeLimitSignalUnderTorchrun(), KilledRank()),
            id="torchrun",
            marks=[pytest.mark.soak, pytest.mark.fault("stop-signal", "kill")],
        ),
    ],
)
def test_a_job_survives_one_fault_after_another_bit_for_bit(
    faults: tuple[Fault, ...], cluster: Cluster, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    config = write_small_run(tmp_path, **LONG_RUN)
    run = tmp_path / "run"
    job = cluster.submit(tmp_path, SCRIPT, TACO_CONFIG=str(config), **QUICK, **faults[0].settings)
    try:
        for fault in faults:
            strike(fault, cluster, job, config)
        assert cluster.wait(job, tmp_path) == "COMPLETED", log_of(tmp_path, job)
    finally:
        for fault in faults:
            fault.heal(cluster)
    log = log_of(tmp_path, job)
    # More starts where the machine is slow: SLURM sends a kill that was not answered in time again, and hits the step
    # of the same number in the next start.
    assert log.count("continuing from") >= len(faults), log
    assert log.count("everything is saved") >= sum(isinstance(fault, TimeLimitSignal | Preemption) for fault in faults)
    assert state_of(run) == undisturbed


@pytest.mark.soak
def test_slurm_itself_signals_before_the_time_limit(cluster: Cluster, tmp_path: Path) -> None:
    """A limit of a minute; SLURM's signal comes half a minute before it, give or take half a minute."""
    config = write_small_run(tmp_path, **{**LONG_RUN, "train__steps": 1_000_000})
    options = ("--nodes=2", "--time=1", "--signal=B:USR1@30")
    job = cluster.submit(tmp_path, SCRIPT, options=options, TACO_CONFIG=str(config), TACO_MAX_FAILURES="9", **QUICK)
    cluster.wait_until(lambda: "continuing from" in log_of(tmp_path, job), job, tmp_path, timeout=300)
    (tmp_path / "run" / "stop").touch()
    assert cluster.wait(job, tmp_path) == "FAILED"
    assert cluster.show(job, "ExitCode") == "75:0"
    log = log_of(tmp_path, job)
    assert "SIGUSR1: the ranks save and end" in log
    assert "after SIGUSR1; requeued" in log


# -- jobs that must end ------------------------------------------------------------------------------------------------


@pytest.mark.fault("bad-config")
def test_a_configuration_that_does_not_fit_ends_the_job_and_makes_nothing(cluster: Cluster, tmp_path: Path) -> None:
    config = write_small_run(tmp_path)
    job = cluster.submit(
        tmp_path, SCRIPT, "train.global_batch_size=20", TACO_CONFIG=str(config), TACO_PROCESSES_PER_NODE="2"
    )
    assert cluster.wait(job, tmp_path) == "FAILED"
    assert "x data-parallel size (4) = 16; try 16" in log_of(tmp_path, job)
    assert cluster.show(job, "Restarts") == "0"
    assert not (tmp_path / "run").exists()


@pytest.mark.fault("job")
def test_a_crash_at_every_start_stops_at_the_cap(cluster: Cluster, tmp_path: Path) -> None:
    config = write_small_run(tmp_path)
    (tmp_path / "train.tokenizer" / "vocab.txt").write_text("of something else\n")
    job = cluster.submit(tmp_path, SCRIPT, TACO_CONFIG=str(config), TACO_MAX_FAILURES="2", **QUICK)
    assert cluster.wait(job, tmp_path) == "FAILED"
    assert cluster.show(job, "Restarts") == "1"
    assert "2 starts in a row have got no further than step 0" in log_of(tmp_path, job)


@pytest.mark.fault("two-runs")
def test_the_second_job_on_a_folder_ends_and_the_first_goes_on_to_the_stop_file(
    cluster: Cluster, tmp_path: Path
) -> None:
    config = write_small_run(tmp_path, **{**LONG_RUN, "train__steps": 100_000})
    first = cluster.submit(tmp_path, SCRIPT, TACO_CONFIG=str(config), **QUICK)
    cluster.wait_until(lambda: has_reached(tmp_path / "run", 5), first, tmp_path)
    second = cluster.submit(tmp_path, SCRIPT, TACO_CONFIG=str(config), **QUICK)
    assert cluster.wait(second, tmp_path) == "FAILED"
    assert f"SLURM job {first}; wait for it" in log_of(tmp_path, second)
    assert cluster.show(second, "Restarts") == "0"
    assert cluster.show(first, "JobState") == "RUNNING"
    (tmp_path / "run" / "stop").touch()
    assert cluster.wait(first, tmp_path) == "FAILED"
    assert cluster.show(first, "ExitCode") == "75:0"
    assert cluster.show(first, "Restarts") == "0"
    stopped = CheckpointManifest.load(find_checkpoint(tmp_path / "run")).step
    assert f"stop at step {stopped} of 100000; remove it" in log_of(tmp_path, first)


@pytest.mark.fault("job")
def test_a_cancelled_job_saves_and_is_not_revived(cluster: Cluster, tmp_path: Path) -> None:
    config = write_small_run(tmp_path, **{**LONG_RUN, "train__steps": 100_000})
    job = cluster.submit(tmp_path, SCRIPT, TACO_CONFIG=str(config), **QUICK)
    cluster.wait_until(lambda: has_reached(tmp_path / "run", 5), job, tmp_path)
    cluster.call("scancel", job)
    cluster.wait_until(lambda: not ranks_of(config), job, tmp_path)
    assert cluster.wait(job, tmp_path) == "CANCELLED", log_of(tmp_path, job)
    assert "everything is saved" in log_of(tmp_path, job)
    assert cluster.show(job, "Restarts") == "0"


@pytest.mark.fault("node")
def test_a_node_that_does_not_see_the_data_is_named_and_left_out(cluster: Cluster, tmp_path: Path) -> None:
    config = write_small_run(tmp_path, train__steps=4, train__global_batch_size=12)
    data = tmp_path / "data"
    data.mkdir()
    write_cyclic_dataset(data / "train")
    settings = {"TACO_CONFIG": str(config), "TACO_PROCESSES_PER_NODE": "1"}
    cluster.call(LOCAL_SLURM, "exec", "2", "mount", "-t", "tmpfs", "nothing", data)
    try:
        job = cluster.submit(tmp_path, SCRIPT, f"data.train=[{data}/train]", options=("--nodes=3",), **settings)
        assert cluster.wait(job, tmp_path) == "COMPLETED", log_of(tmp_path, job)
    finally:
        cluster.call(LOCAL_SLURM, "exec", "2", "umount", data)
    log = log_of(tmp_path, job)
    assert f"preflight: taco2: {data}/train.bin: cannot be read here" in log
    assert "taco2 failed; requeued without taco2" in log
    assert cluster.show(job, "ExcNodeList") == "taco2"
    assert cluster.show(job, "NodeList") == "taco[1,3-4]"
