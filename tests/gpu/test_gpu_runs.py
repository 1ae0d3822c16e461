"""Whole runs on a GPU: killed and continued, moved from and to the CPU, exported, told that they do not fit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from small_runs import write_small_run

from pretrain.checkpoint.manifest import CheckpointManifest, find_checkpoint
from pretrain.metrics import read_metrics

STEPS = 24
RUN: dict[str, Any] = {"train__steps": STEPS, "train__eval_every": 12, "checkpoint": {"every_steps": 5, "keep": 3}}
DETERMINISTIC = ("run.device=cuda", "train.deterministic=true")


def start(config: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pretrain.train", "--config", str(config), *overrides]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen[str], expected: int = 0) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == expected, output
    return output


def run(config: Path, *overrides: str) -> str:
    return finish(start(config, *overrides))


def kill_at(step: int, config: Path, *overrides: str) -> None:
    process = start(config, *overrides)
    end = time.monotonic() + 200
    while time.monotonic() < end and process.poll() is None:
        if any(record["step"] >= step for record in read_metrics(config.parent / "run")):
            break
        time.sleep(0.003)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def state_of(folder: Path) -> dict[str, str]:
    manifest = CheckpointManifest.load(find_checkpoint(folder / "run"))
    assert manifest.step == STEPS
    return {record.name: record.xxh3_128 for record in manifest.files if record.name.startswith("state/")}


def losses_of(folder: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_metrics(folder / "run") if "loss" in record}


SETTINGS = {
    "fp32 ZeRO-1": ("zero.stage=1",),
    "bf16 ZeRO-1": ("zero.stage=1", "precision=bf16"),
    "bf16 ZeRO-1, replayed": ("zero.stage=1", "precision=bf16", "train.cuda_graphs=true"),
    "bf16 ZeRO-1, compiled": ("zero.stage=1", "precision=bf16", "train.compile=layers"),
    "bf16 ZeRO-3": ("zero.stage=3", "precision=bf16"),
    "fp16 ZeRO-2": ("zero.stage=2", "precision=fp16"),
    "bf16 ZeRO-2, optimizer offloaded": ("zero.stage=2", "precision=bf16", "zero.offload_optimizer={device: cpu}"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_killed_and_continued_is_bitwise_equal(name: str, tmp_path: Path) -> None:
    overrides = (*DETERMINISTIC, *SETTINGS[name])
    clean, broken = (write_small_run(make(tmp_path / part), **RUN) for part in ("clean", "broken"))
    run(clean, *overrides)
    kill_at(11, broken, *overrides)
    assert "continuing from" in run(broken, *overrides)
    assert state_of(broken.parent) == state_of(clean.parent)


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("first", ["cuda", "cpu"])
def test_moves_between_cpu_and_gpu(first: str, tmp_path: Path) -> None:
    """Without dropout, which draws other units there; the losses go on as if nothing had been moved."""
    still = ("model.hidden_dropout=0", "model.attention_dropout=0", "optim.eps=1e-4")
    clean, moved = (write_small_run(make(tmp_path / part), **RUN) for part in ("clean", "moved"))
    run(clean, "run.device=cpu", *still)
    second = "cpu" if first == "cuda" else "cuda"
    kill_at(11, moved, f"run.device={first}", *still)
    run(moved, f"run.device={second}", *still)
    assert losses_of(moved.parent) == pytest.approx(losses_of(clean.parent), rel=1e-5)


def test_what_a_gpu_trained_is_exported_and_reads_the_same(tmp_path: Path) -> None:
    config = write_small_run(tmp_path, **RUN)
    run(config, "run.device=cuda", "precision=bf16", "zero.stage=3")
    command = [sys.executable, "-m", "pretrain.export", str(tmp_path / "run"), str(tmp_path / "export")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "export" / "model.safetensors").is_file()


def test_more_ranks_than_gpus_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "99")
    monkeypatch.setenv("RANK", "99")
    monkeypatch.setenv("WORLD_SIZE", "100")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "100")
    config = write_small_run(tmp_path, train__global_batch_size=400)
    output = finish(start(config, "run.device=cuda"), expected=2)
    assert "start at most" in output


def test_twenty_replayed_steps_end_at_the_weights_of_eager_ones(tmp_path: Path) -> None:
    folders = []
    for graphs in ("false", "true"):
        config = write_small_run(make(tmp_path / graphs), **RUN)
        run(config, *DETERMINISTIC, "precision=bf16", f"train.cuda_graphs={graphs}")
        folders.append(config.parent)
    assert losses_of(folders[1]) == losses_of(folders[0])
    assert state_of(folders[1]) == state_of(folders[0])
