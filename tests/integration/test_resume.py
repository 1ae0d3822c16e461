"""A run that is killed or stopped and started again ends bit for bit as one that was not."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from forked import Ranks, run_ranks, started_ranks
from small_runs import small_config, write_small_run

from pretrain import saving
from pretrain.checkpoint.manifest import CheckpointManifest, find_checkpoint, list_checkpoints
from pretrain.checkpoint.reshape import reshape_checkpoint
from pretrain.cli import run_program
from pretrain.export import export_checkpoint
from pretrain.metrics import read_metrics
from pretrain.train import app, train

STEPS = 60
LONG_RUN: dict[str, Any] = {"train__steps": STEPS, "train__eval_every": 20, "checkpoint": {"every_steps": 7, "keep": 2}}


def command(config: Path, num_processes: int = 1, *overrides: str) -> list[str]:
    program = ["-m", "pretrain.train", "--config", str(config), *overrides]
    if num_processes == 1:
        return [sys.executable, *program]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(num_processes),
        *rendezvous,
        *program,
    ]


def start(config: Path, num_processes: int = 1, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(config, num_processes, *overrides),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 120) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_with_ranks(process)  # torchrun's ranks are in sessions of their own, and would go on for ever
        raise
    return process.returncode, output


def kill_with_ranks(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:
            child.kill()


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 90
    while time.monotonic() < end and process.poll() is None:
        if any(record["step"] >= step for record in read_metrics(run)):
            return
        time.sleep(0.003)
    kill_with_ranks(process)
    raise AssertionError(f"no step {step} within 90 s: {finish(process)}")


def state_of(run: Path, step: int = STEPS) -> dict[str, str]:
    """Hashes of every state file of the newest checkpoint: weights, optimizer, counters."""
    manifest = CheckpointManifest.load(find_checkpoint(run))
    assert manifest.step == step
    return {record.name: record.xxh3_128 for record in manifest.files if record.name.startswith("state/")}


def losses_of(run: Path) -> dict[int, tuple[float, float]]:
    return {r["step"]: (r["loss"], r["grad_norm"]) for r in read_metrics(run) if "loss" in r}


@pytest.fixture(scope="module")
def _megatron() -> None:
    import megatron.core.tensor_parallel  # noqa: F401  # before ranks fork


def run_program_on(config: Path, *overrides: str) -> None:
    """One rank of the program `taco train`, in a forked process that need not import everything again."""
    run_program(app, ["--config", str(config), *overrides])


def run_to_its_end(config: Path, *overrides: str) -> str:
    """What a run of one rank prints, which ends well."""
    with started_ranks(1, run_program_on, config, *overrides) as ranks:
        assert ranks.wait(120) == [0], ranks.output()
        return ranks.output()


@contextlib.contextmanager
def run_at_step(config: Path, step: int) -> Iterator[Ranks]:
    """A run of one rank that has reached `step`."""
    run = config.parent / "run"
    with started_ranks(1, run_program_on, config) as ranks:
        ranks.wait_until(lambda: any(record["step"] >= step for record in read_metrics(run)), timeout=90)
        yield ranks


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clean")
    run_to_its_end(write_small_run(folder, **LONG_RUN))
    return folder / "run"


@pytest.mark.slow
def test_keeps_the_newest_checkpoints_only(uninterrupted: Path) -> None:
    assert [path.name for path in list_checkpoints(uninterrupted / "checkpoints")] == ["step-0000060", "step-0000056"]
    assert (uninterrupted / "checkpoints" / "latest").read_text() == "step-0000060\n"
    assert not list((uninterrupted / "checkpoints").glob("*.tmp"))


def test_run_folder_holds_what_the_documentation_says(uninterrupted: Path) -> None:
    names = {path.name for path in uninterrupted.iterdir()}
    assert {"config.yaml", "ds_config.json", "env.json", "metrics.jsonl", "checkpoints", "logs"} <= names
    first, *_ = read_metrics(uninterrupted)
    assert {"step", "loss", "mlm_loss", "contrastive_loss", "lr", "grad_norm", "tokens_per_second"} <= first.keys()
    validation = [r for r in read_metrics(uninterrupted) if "validation_mlm_loss" in r]
    assert [r["step"] for r in validation] == [20, 40, 60]


@pytest.mark.fault("kill")
@pytest.mark.slow
def test_killed_twice_and_resumed_is_bitwise_equal(uninterrupted: Path, tmp_path: Path) -> None:
    config = write_small_run(tmp_path, **LONG_RUN)
    rng = random.Random(5)
    for kill_at in sorted(rng.sample(range(8, STEPS - 5), 2)):
        with run_at_step(config, kill_at) as ranks:
            ranks.kill()
    assert "continuing from" in run_to_its_end(config)
    assert state_of(tmp_path / "run") == state_of(uninterrupted)
    assert losses_of(tmp_path / "run") == losses_of(uninterrupted)


@pytest.mark.fault("stop-signal")
@pytest.mark.slow
def test_sigterm_saves_exits_75_and_continues_bitwise(uninterrupted: Path, tmp_path: Path) -> None:
    config = write_small_run(tmp_path, **LONG_RUN)
    with run_at_step(config, 10) as ranks:
        ranks.send(signal.SIGTERM)
        assert ranks.wait(60) == [75], ranks.output()
        assert "the same command continues from here" in ranks.output()
    run_to_its_end(config)
    assert state_of(tmp_path / "run") == state_of(uninterrupted)


@pytest.mark.fault("kill")
@pytest.mark.soak
def test_two_ranks_killed_and_resumed_are_bitwise_equal(tmp_path: Path) -> None:
    """Under torchrun, and killed with it; faults/test_killed_ranks.py has the same without a launcher, sooner."""
    clean, broken = tmp_path / "clean", tmp_path / "broken"
    clean.mkdir()
    broken.mkdir()
    code, output = finish(start(write_small_run(clean, **LONG_RUN), 2))
    assert code == 0, output
    config = write_small_run(broken, **LONG_RUN)
    process = start(config, 2)
    wait_for_step(broken / "run", 30, process)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    _kill_left_over_ranks(config)
    code, output = finish(start(config, 2))
    assert code == 0, output
    assert state_of(broken / "run") == state_of(clean / "run")
    assert losses_of(broken / "run") == losses_of(clean / "run")


@pytest.mark.fault("stop-signal")
@pytest.mark.slow
def test_interrupt_from_the_terminal_saves_once_on_all_ranks(tmp_path: Path) -> None:
    """Ctrl-C reaches the launcher and both ranks, and the launcher forwards it: still one orderly stop."""
    config = write_small_run(tmp_path, **{**LONG_RUN, "train__steps": 2000, "checkpoint": {"every_steps": 2000}})
    process = start(config, 2)
    wait_for_step(tmp_path / "run", 10, process)
    for member in _processes_of(config):
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGINT)
    _, output = finish(process)
    assert "the same command continues from here" in output, output
    manifest = CheckpointManifest.load(find_checkpoint(tmp_path / "run"))
    assert 10 <= manifest.step < 2000
    assert manifest.layout.data == 2


def _kill_left_over_ranks(config: Path) -> None:
    """torchrun starts its workers in sessions of their own: the ranks of a killed run may live on for a moment."""
    left_over = _processes_of(config)
    for member in left_over:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(left_over, timeout=10)


def _processes_of(config: Path) -> list[psutil.Process]:
    """The launcher and the ranks of the run with this configuration."""
    found = psutil.process_iter(["cmdline"])
    return [process for process in found if str(config) in (process.info["cmdline"] or [])]


@pytest.mark.slow
def test_complete_run_says_so_and_changes_nothing(uninterrupted: Path) -> None:
    """Started from a shell, as people do: the one cold start among these tests."""
    before = state_of(uninterrupted)
    code, output = finish(start(uninterrupted.parent / "run.yaml"))
    assert code == 0, output
    assert "done" in output
    assert state_of(uninterrupted) == before
    assert len(losses_of(uninterrupted)) == STEPS


@pytest.mark.fault("damaged-checkpoint")
@pytest.mark.slow
def test_damaged_newest_checkpoint_is_set_aside_and_the_previous_one_used(tmp_path: Path, uninterrupted: Path) -> None:
    config = write_small_run(tmp_path, **{**LONG_RUN, "checkpoint": {"every_steps": 20, "keep": 3}})
    run_to_its_end(config)
    newest = find_checkpoint(tmp_path / "run")
    victim = next((newest / "state").glob("rank-*.safetensors"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    output = run_to_its_end(config)
    assert "content differs from what was written" in output
    assert "step-0000040" in output
    assert (newest.parent / (newest.name + ".bad")).is_dir()
    assert state_of(tmp_path / "run") == state_of(uninterrupted)


@pytest.mark.fault("other-layout")
@pytest.mark.slow
@pytest.mark.usefixtures("_megatron")
def test_a_run_continues_in_other_layouts_and_exports_the_same_model_from_each(tmp_path: Path) -> None:
    """One process, then tensor and sequence parallel, then a pipeline, then ZeRO-3: as if it had been one process."""
    quiet = {"model": {**small_config(tmp_path)["model"], "hidden_dropout": 0.0, "attention_dropout": 0.0}}
    # The schedule is constant up to the last step, wherever train.steps ends.
    schedule = {"optim__schedule": "wsd", "optim__decay_steps": 1, "optim__warmup_steps": 0, "optim__eps": 1e-4}
    settings: dict[str, Any] = {**quiet, **schedule, "checkpoint": {"every_steps": 100}}
    clean, moved = tmp_path / "clean", tmp_path / "moved"
    for folder in (clean, moved):
        folder.mkdir()
    run_ranks(1, train_on, write_small_run(clean, **settings))
    config = write_small_run(moved, **settings)
    layouts: list[tuple[int, tuple[str, ...]]] = [
        (1, ()),
        (2, ("parallel.tensor=2", "parallel.sequence=true")),
        (2, ("parallel.pipeline=2",)),
        (2, ("zero.stage=3",)),
    ]
    for steps, (world_size, layout) in zip((2, 4, 6, 8), layouts, strict=True):
        run_ranks(world_size, train_on, config, *layout, f"train.steps={steps}")
        newest = find_checkpoint(moved / "run")
        again = reshape_checkpoint(newest, moved / f"reshaped-{steps}", num_files=3, weights_only=False)
        exported = set()
        for source, target in ((newest, moved / f"export-{steps}"), (again, moved / f"again-{steps}")):
            export(source, target)
            exported.add((target / "model.safetensors").read_bytes())
        assert len(exported) == 1
    assert (moved / "run" / "logs" / "rank_00000.log").read_text().count("continued with") == 3
    expected, found = losses_of(clean / "run"), losses_of(moved / "run")
    assert found.keys() == expected.keys() == set(range(1, 9))
    for step, figures in expected.items():
        assert found[step] == pytest.approx(figures, rel=1e-5)


def train_on(config: Path, *overrides: str) -> None:
    """One rank of `taco train`, in a forked process that need not import everything again."""
    train(config=config, overrides=list(overrides), dry_run=False, allow_change=["train.steps"])


def train_failing(config: Path) -> None:
    """One rank of a run that believes a save to cost nothing before it has measured one."""
    saving._GUESSED_STALL_SECONDS = 0.0
    train(config=config, overrides=[], dry_run=False, allow_change=None)


def test_a_job_that_fails_often_saves_by_itself(tmp_path: Path) -> None:
    checkpoint = {"every_steps": None, "hours_between_failures": 1e-9, "keep": 9}
    run_ranks(1, train_failing, write_small_run(tmp_path, checkpoint=checkpoint))
    steps = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert "step-0000001" in steps
    assert "step-0000008" in steps


def export(run: Path, out: Path) -> None:
    """As `taco export`, which compares the logits by itself."""
    assert export_checkpoint(find_checkpoint(run), out)["is_new"]


@pytest.mark.slow
@pytest.mark.usefixtures("_megatron")
@pytest.mark.parametrize("layout", [("parallel.tensor=2", "parallel.sequence=true"), ("parallel.pipeline=2",)])
def test_model_parallel_ranks_continue_bit_for_bit_and_are_exported(layout: tuple[str, ...], tmp_path: Path) -> None:
    runs = []
    for name, stops in (("once", [8]), ("twice", [4, 8])):
        folder = tmp_path / name
        folder.mkdir()
        config = write_small_run(folder, train__steps=8, optim__schedule="wsd", optim__decay_steps=1)
        for steps in stops:
            run_ranks(2, train_on, config, *layout, f"train.steps={steps}")
        runs.append(folder / "run")
    assert state_of(runs[0], step=8) == state_of(runs[1], step=8)
    export(runs[0], tmp_path / "export")
    assert (tmp_path / "export" / "model.safetensors").is_file()
