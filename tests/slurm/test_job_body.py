"""What slurm/job.sh decides, with programs in the place of SLURM's and of training that do what a test wants."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_cluster import SAVE_5, FakeCluster, make_cluster
from project import ROOT

from pretrain.init.project import lay_out

SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
TRAINING_SCRIPTS = [path for path in SCRIPTS if path.stem.startswith(("taco_", "mlm_"))]


@pytest.fixture
def cluster(tmp_path: Path) -> FakeCluster:
    return make_cluster(tmp_path / "fake", run=tmp_path / "run; $(touch canary) \n two")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_is_valid_bash_and_clean_under_shellcheck(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("shellcheck is not installed")
    found = subprocess.run([shellcheck, "-x", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", TRAINING_SCRIPTS, ids=lambda path: path.stem)
def test_siblings_are_one_skeleton(script: Path) -> None:
    text = script.read_text()
    assert (ROOT / "configs" / f"{script.stem}.yaml").exists()
    assert f"config=configs/{script.stem}.yaml\n" in text
    for header in ("--requeue", "--signal=B:USR1@300", "--open-mode=append", f"--job-name={script.stem}"):
        assert f"#SBATCH {header}\n" in text
    assert text.endswith('/slurm/job.sh"\n')
    assert text.count("\n") <= 25


@pytest.mark.fault("shell")
def test_a_finished_run_ends_the_job(cluster: FakeCluster) -> None:
    code, output = cluster.submit("optim.lr=1", "a b; $(touch canary)")
    assert code == 0, output
    assert "done: 10 steps" in output
    assert not cluster.is_requeued()
    train = [call for call in cluster.calls("python") if "pretrain.train" in call]
    assert train == [
        ["-m", "pretrain.train", "--config", "configs/taco_large.yaml", "optim.lr=1", "a b; $(touch canary)"]
    ]
    assert not list(ROOT.glob("canary")) + list(cluster.folder.parent.rglob("canary"))


def test_a_job_of_a_laid_out_project_runs_there_with_the_python_that_is_active(
    cluster: FakeCluster, tmp_path: Path
) -> None:
    cluster.project = tmp_path / "a thesis"
    lay_out(cluster.project)
    code, output = cluster.submit("optim.lr=1", TACO_PYTHON="")
    assert code == 0, output
    assert "done: 10 steps" in output
    (train,) = [call for call in cluster.calls("python3") if "pretrain.train" in call]
    assert train == ["-m", "pretrain.train", "--config", "configs/taco_large.yaml", "optim.lr=1"]
    assert not cluster.calls("python")
    step = [call for call in cluster.calls("srun") if "pretrain.train" in call][0]
    assert "slurm/task.sh" in step
    ended = subprocess.run(
        ["slurm/task.sh", "pwd"],
        cwd=cluster.project,
        env={"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path), "TACO_LAUNCHER": "torchrun"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout == f"{cluster.project}\n"
    assert (cluster.run / "slurm" / "7.0" / "job.sh").read_bytes() == (ROOT / "slurm" / "job.sh").read_bytes()


def test_the_environment_in_the_project_comes_before_the_active_one(cluster: FakeCluster, tmp_path: Path) -> None:
    cluster.project = tmp_path / "thesis"
    lay_out(cluster.project)
    (cluster.project / ".venv" / "bin").mkdir(parents=True)
    (cluster.project / ".venv" / "bin" / "python").symlink_to(cluster.folder / "python")
    code, output = cluster.submit(TACO_PYTHON="")
    assert code == 0, output
    assert [call for call in cluster.calls("python") if "pretrain.train" in call]
    assert not cluster.calls("python3")


def test_the_preprocessing_script_of_a_laid_out_project_runs_there(cluster: FakeCluster, tmp_path: Path) -> None:
    cluster.project = tmp_path / "thesis"
    lay_out(cluster.project)
    array = dict.fromkeys(("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX"), "0")
    words = ["--input", "x.jsonl", "--output-prefix", "data/train"]
    cluster.submit(*words, script="preprocess", TACO_PYTHON="", SLURM_ARRAY_TASK_COUNT="1", **array)
    (call,) = cluster.calls("python3")
    assert call[:4] == ["-m", "pretrain.cli", "data", "preprocess"]
    assert call[call.index("--output-prefix") + 1] == "data/train.part-00000-of-00001"


def test_one_task_per_rank_with_its_share_of_the_cores(cluster: FakeCluster) -> None:
    cluster.submit()
    (step,) = [call for call in cluster.calls("srun") if "pretrain.train" in call]
    assert {"--ntasks=4", "--ntasks-per-node=2", "--nodes=2", "--cpus-per-task=8"} <= set(step)
    assert {"--kill-on-bad-exit=1", "--wait=60", "--label"} <= set(step)
    assert not [word for word in step if word.startswith("--container")]


@pytest.mark.fault("port")
def test_torchrun_gets_a_port_of_the_job_and_a_meeting_of_the_start(cluster: FakeCluster) -> None:
    code, output = cluster.submit(TACO_LAUNCHER="torchrun", SLURM_RESTART_COUNT="3", SLURM_JOB_ID="1234567")
    assert code == 0, output
    (step,) = [call for call in cluster.calls("srun") if "torch.distributed.run" in call]
    assert {"--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=16", "--kill-on-bad-exit=1"} <= set(step)
    assert step[step.index("--rdzv-endpoint") + 1] == "n1:24567"
    assert step[step.index("--rdzv-id") + 1] == "1234567.3"
    assert step[step.index("--nproc-per-node") + 1] == "2"


def test_a_container_only_where_an_image_is_given(cluster: FakeCluster) -> None:
    cluster.submit(TACO_CONTAINER="/images/a b.sqsh")
    for step in cluster.calls("srun"):
        assert "--container-image=/images/a b.sqsh" in step
        assert f"--container-mounts={ROOT}:{ROOT}" in step


def test_what_was_run_is_kept_without_secrets(cluster: FakeCluster) -> None:
    cluster.submit("optim.lr=1", NCCL_SOCKET_IFNAME="ib0", HF_TOKEN="hf_secret", SLURM_JWT="jwt_secret", OTHER="x")
    kept = {path.name: path.read_text() for path in (cluster.run / "slurm" / "7.0").iterdir()}
    assert set(kept) >= {"script.sh", "job.sh", "task.sh", "arguments", "environment", "job"}
    assert "configs/taco_large.yaml optim.lr=1" in kept["arguments"]
    assert "NCCL_SOCKET_IFNAME=ib0\n" in kept["environment"]
    assert "TORCH_FR_BUFFER_SIZE=2000\n" in kept["environment"]
    assert "_secret" not in "".join(kept.values())
    assert "OTHER" not in kept["environment"]


def test_an_end_without_the_mark_is_requeued_whatever_the_exit_code(cluster: FakeCluster) -> None:
    for number, code in enumerate((0, 75, 1, 137)):
        (cluster.folder / "train").write_text(f'mkdir -p "$RUN/checkpoints/step-000000{number + 1}"\nexit {code}')
        (cluster.folder / "state").write_text("RUNNING\n")
        (cluster.folder / "scontrol.calls").unlink(missing_ok=True)
        ended, output = cluster.submit(SLURM_RESTART_COUNT=str(number))
        assert ended == -signal.SIGTERM, output
        assert cluster.is_requeued(), output


def test_a_mark_of_fewer_steps_is_none(cluster: FakeCluster) -> None:
    cluster.run.mkdir()
    (cluster.run / "done.json").write_text('{"step": 9, "time": "then"}\n')
    (cluster.folder / "train").write_text(SAVE_5)
    cluster.submit()
    assert cluster.is_requeued()


def test_a_run_that_is_done_starts_nothing(cluster: FakeCluster) -> None:
    cluster.run.mkdir()
    (cluster.run / "done.json").write_text('{"step": 10, "time": "then"}\n')
    code, output = cluster.submit()
    assert (code, len(cluster.calls("srun"))) == (0, 1)
    assert "all 10 steps were there already" in output


@pytest.mark.fault("job")
@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PREEMPTED"])
def test_a_job_that_slurm_is_ending_is_not_revived(cluster: FakeCluster, state: str) -> None:
    (cluster.folder / "train").write_text(SAVE_5)
    (cluster.folder / "state").write_text(f"{state}\n")
    code, output = cluster.submit()
    assert code == 1
    assert f"SLURM says {state}" in output
    assert not cluster.is_requeued()


@pytest.mark.fault("job")
def test_a_signal_that_is_still_on_its_way_does_not_end_the_job(cluster: FakeCluster) -> None:
    (cluster.folder / "train").write_text(SAVE_5)
    (cluster.folder / "state").write_text("SIGNALING\n")
    _, output = cluster.submit()
    assert cluster.is_requeued(), output


def test_the_stop_file_ends_the_job_and_keeps_it_from_starting(cluster: FakeCluster) -> None:
    (cluster.folder / "train").write_text(SAVE_5 + 'touch "$RUN/stop"\nexit 75')
    code, output = cluster.submit()
    assert code == 75
    assert "stop at step 5 of 10; remove it, and submit again" in output
    code, output = cluster.submit()
    assert code == 75
    assert "stop is there: remove it" in output
    assert not cluster.is_requeued()


@pytest.mark.fault("job")
def test_a_crash_without_progress_stops_at_the_cap(cluster: FakeCluster) -> None:
    (cluster.folder / "train").write_text("exit 1")
    for restart in range(3):
        (cluster.folder / "state").write_text("RUNNING\n")
        code, output = cluster.submit(SLURM_RESTART_COUNT=str(restart))
        assert (code == -signal.SIGTERM) == (restart < 2), output
    assert "3 starts in a row have got no further than step 0" in output
    assert len([call for call in cluster.calls("scontrol") if call == ["requeue", "7"]]) == 2


@pytest.mark.fault("job")
def test_starts_that_a_dead_node_ended_count_too(cluster: FakeCluster) -> None:
    (cluster.run / "slurm").mkdir(parents=True)
    (cluster.run / "slurm" / "7.starts").write_text("0\n0\n0\n")
    code, output = cluster.submit(SLURM_RESTART_COUNT="3")
    assert code == 1
    assert "3 starts in a row have got no further than step 0" in output
    assert not [call for call in cluster.calls("python") if "pretrain.train" in call]


def test_progress_forgives_earlier_failures(cluster: FakeCluster) -> None:
    (cluster.run / "slurm").mkdir(parents=True)
    (cluster.run / "slurm" / "7.starts").write_text("0\n0\n")
    (cluster.run / "checkpoints" / "step-0000004.bad").mkdir(parents=True)
    (cluster.folder / "train").write_text(SAVE_5 + "exit 1")
    cluster.submit(SLURM_RESTART_COUNT="2")
    assert cluster.is_requeued()
    assert (cluster.run / "slurm" / "7.starts").read_text() == "0\n0\n0\n"


def test_restarts_have_a_cap(cluster: FakeCluster) -> None:
    (cluster.folder / "train").write_text(SAVE_5)
    code, output = cluster.submit(SLURM_RESTART_COUNT="4", TACO_MAX_RESTARTS="4")
    assert code == 1
    assert "4 restarts are the most" in output
    assert not cluster.is_requeued()


def test_a_plan_that_is_refused_ends_the_job_before_anything_is_made(cluster: FakeCluster) -> None:
    (cluster.folder / "plan.code").write_text("2")
    code, output = cluster.submit()
    assert code == 2, output
    assert not cluster.run.exists()


def test_refused_by_training_is_not_requeued(cluster: FakeCluster) -> None:
    """Another job took the folder between the plan and the start of training."""
    (cluster.folder / "train").write_text('echo 2 >"$FAKE/plan.code"\nexit 1')
    code, output = cluster.submit()
    assert code == 2, output
    assert not cluster.is_requeued()


@pytest.mark.parametrize("part", ["plan", "report"])
def test_preempted_before_training_is_requeued(cluster: FakeCluster, part: str) -> None:
    (cluster.folder / f"{part}.code").write_text(str(128 + signal.SIGTERM))
    _, output = cluster.submit()
    assert "stopped by a signal" in output
    assert cluster.is_requeued()


def test_a_task_of_an_array_requeues_itself_alone(cluster: FakeCluster) -> None:
    (cluster.folder / "train").write_text(SAVE_5)
    cluster.submit(SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="2")
    assert ["requeue", "7_2"] in cluster.calls("scontrol")


def test_failing_nodes_are_left_out_at_the_requeue(cluster: FakeCluster) -> None:
    (cluster.folder / "failing").write_text("n2\n")
    (cluster.folder / "compare.code").write_text("1")
    (cluster.folder / "excluded").write_text("n9")
    code, output = cluster.submit()
    assert code == 0, output
    assert "preflight: n2 failed; requeued without n2" in output
    assert (cluster.folder / "scontrol.input").read_text() == "requeue 7\nupdate JobId=7 ExcNodeList=n9,n2\n"
    assert not [call for call in cluster.calls("python") if "pretrain.train" in call]


def test_a_preflight_that_fails_everywhere_ends_the_job(cluster: FakeCluster) -> None:
    (cluster.folder / "compare.code").write_text("2")
    code, output = cluster.submit()
    assert code == 1
    assert "fails on all nodes" in output
    assert not cluster.is_requeued()


def test_failing_nodes_at_the_cap_come_with_the_option_to_type(cluster: FakeCluster) -> None:
    (cluster.folder / "failing").write_text("n2\n")
    (cluster.folder / "compare.code").write_text("1")
    code, output = cluster.submit(TACO_MAX_RESTARTS="0")
    assert code == 1
    assert "sbatch --exclude=n2" in output


@pytest.mark.fault("stop-signal")
def test_the_signal_before_the_time_limit_reaches_the_ranks_and_the_job_is_requeued(cluster: FakeCluster) -> None:
    (cluster.folder / "train").write_text(
        'trap \'mkdir -p "$RUN/checkpoints/step-0000005"; exit 75\' USR1\ntouch "$FAKE/up"\n'
        "while :; do read -rt 0.05 <> <(:) || true; done"
    )
    process = cluster.start()
    end = time.monotonic() + 30
    while not (cluster.folder / "up").exists() and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=30)
    assert "SIGUSR1: the ranks save and end" in output
    assert "at step 5 of 10 after SIGUSR1; requeued" in output
    assert cluster.is_requeued()


@pytest.mark.fault("shell")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"TACO_LAUNCHER": "mpirun"}, "TACO_LAUNCHER=mpirun: srun (one task per rank) or torchrun"),
        ({"TACO_MAX_RESTARTS": "a[$(touch canary)]"}, "no number"),
        ({"TACO_PROCESSES_PER_NODE": "a[$(touch canary)]"}, "no number"),
        ({"SLURM_GPUS_PER_NODE": "0"}, "say with TACO_PROCESSES_PER_NODE how many ranks"),
    ],
)
def test_settings_that_cannot_be(cluster: FakeCluster, settings: dict[str, str], words: str) -> None:
    code, output = cluster.submit(**settings)
    assert code == 2
    assert words in output
    assert not list(ROOT.glob("canary"))


def test_outside_a_job_the_script_says_how_it_is_started(cluster: FakeCluster) -> None:
    done = subprocess.run(
        [TRAINING_SCRIPTS[0]], capture_output=True, text=True, env={"PATH": os.environ["PATH"]}, check=False
    )
    assert done.returncode != 0
    assert "submit this script with sbatch" in done.stderr


def test_a_rank_learns_its_place_and_gets_caches_of_its_own_node(tmp_path: Path) -> None:
    variables = {"TMPDIR": str(tmp_path), "PATH": os.environ["PATH"], "TACO_LAUNCHER": "srun"}
    variables |= {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "TACO_PROCESSES_PER_NODE": "4"}
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TRITON_CACHE_DIR"]
    command = [ROOT / "slurm" / "task.sh", "printenv", *names]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    *place, cache = done.stdout.split()
    assert place == ["5", "8", "1", "4"]
    assert cache == f"{tmp_path}/taco-{os.geteuid()}/triton"
    assert (tmp_path / f"taco-{os.geteuid()}").stat().st_mode & 0o777 == 0o700


def test_caches_are_never_in_a_folder_that_somebody_else_has_prepared(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / f"taco-{os.geteuid()}").symlink_to(elsewhere)
    variables = {"TMPDIR": str(tmp_path), "PATH": os.environ["PATH"], "TACO_LAUNCHER": "torchrun"}
    command = [ROOT / "slurm" / "task.sh", "printenv", "TRITON_CACHE_DIR"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert not done.stdout.startswith(f"{tmp_path}/taco-")
