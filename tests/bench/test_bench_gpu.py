"""The script for a lent GPU: whatever an experiment does, it is recorded and the next one goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.bench import gpu as gpu_module
from pretrain.bench.gpu import _carry_out, _table, gpu
from pretrain.bench.gpu_experiments import BERT_LARGE, EXPERIMENTS, TINY, Experiment
from pretrain.bench.gpu_worker import LEAVES_MEMORY
from pretrain.errors import ConfigError, TacoError

DONE = {"seconds": [0.1, 0.3, 0.2], "peak_bytes": 10**9, "device_name": "cpu", "model_flops": 1e9, "real_tokens": 100.0}


class ScriptedWorker:
    """Does with each experiment what its name says."""

    starts = 0

    def __init__(self, experiments: list[Experiment], **options: object) -> None:
        ScriptedWorker.starts += 1
        self.code: int | None = None
        self.process = self
        self.lines: list[dict[str, Any] | None] = []
        for name in [experiment.name for experiment in experiments]:
            self.lines.append({"event": "begin", "name": name})
            if name in ("crashes", "hangs", "leaves memory"):
                if name == "leaves memory":
                    self.lines.append({"event": "end", "name": name, "status": "done", **DONE})
                self.code = {"crashes": 1, "hangs": None, "leaves memory": LEAVES_MEMORY}[name]
                self.lines.append(None)
                return
            self.lines.append({"event": "stage", "name": name, "stage": "timing"})
            self.lines.append({"event": "end", "name": name, "status": "done", **DONE})

    def next_line(self, seconds: float) -> dict[str, Any] | None:
        return self.lines.pop(0)

    def poll(self) -> int | None:
        return self.code

    def complaint(self) -> str:
        return "RuntimeError: illegal memory access"

    def end(self) -> None:
        self.lines = []


def outcome(names: list[str], monkeypatch: pytest.MonkeyPatch, *, seconds: float = 1e9) -> list[tuple[str, str]]:
    monkeypatch.setattr(gpu_module, "_Worker", ScriptedWorker)
    monkeypatch.setattr(gpu_module.time, "monotonic", lambda: 0.0)
    ScriptedWorker.starts = 0
    records = list(_carry_out([Experiment(name) for name in names], seconds, is_tiny=True, steps=1))
    return [(record["name"], record["status"]) for record in records]


def test_what_crashes_or_hangs_costs_one_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["first", "crashes", "second", "hangs", "third", "leaves memory", "fourth"]
    assert outcome(names, monkeypatch) == [
        ("first", "done"), ("crashes", "failed"), ("second", "done"), ("hangs", "out of time"), ("third", "done"),
        ("leaves memory", "done"), ("fourth", "done"),
    ]  # fmt: skip
    assert ScriptedWorker.starts == 4


def test_what_the_deadline_cuts_off_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcome(["first", "second"], monkeypatch, seconds=1.0) == [
        ("first", "out of time"),
        ("second", "out of time"),
    ]


def test_the_table_holds_what_was_measured_and_what_was_not() -> None:
    done = [{"name": name, "status": "done", **DONE, "seconds": [s]} for name, s in (("taco", 0.11), ("mlm", 0.1))]
    gpu_run = {
        **done[0], "name": "on a GPU", "device_name": "NVIDIA H100 80GB HBM3", "model_flops": 0.5 * 989.4e12 * 0.11,
        "profile": {"busy_seconds": 0.1, "kernel_count": 1800, "synchronisations": 1},
    }  # fmt: skip
    text = _table([*done, gpu_run, {"name": "fp8", "status": "skipped", "reason": "no such key"}])
    assert "price of the contrastive loss, taco: 10.0%" in text
    assert "| on a GPU | 110.00 | 110.00 to 110.00 |  | 100.00 | 1,800 | 1 | 1.00 | 909 | 494.7 | 50.0% |" in text
    assert "fp8: skipped: no such key" in text


def test_experiments_have_names_of_their_own_and_begin_with_the_figures_that_are_wanted() -> None:
    names = [experiment.name for experiment in EXPERIMENTS]
    assert len(names) == len(set(names))
    assert names[:2] == ["taco", "mlm"]
    assert [experiment.shape(BERT_LARGE).rows for experiment in EXPERIMENTS if "rows" in experiment.name][:1] == [128]
    assert TINY.device == "cpu"
    with pytest.raises(ConfigError, match="--only 'nothing': there is no such experiment; choose from numerics, taco"):
        gpu(only=["nothing"])


@pytest.mark.slow
def test_the_script_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out" / "results.jsonl"
    gpu(out=out, minutes=3.0, steps=2, tiny=True, only=["taco", "pack rows"])
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(record["name"], record["status"]) for record in records] == [
        ("machine", "done"), ("taco", "done"), ("pack rows", "done"),
    ]  # fmt: skip
    assert len(records[1]["seconds"]) == 2
    assert set(records[1]["parts"]) == {"data", "forward", "backward", "optimizer", "communication", "host"}
    assert "| taco |" in capsys.readouterr().out
    with pytest.raises(TacoError, match="no experiment was carried out"):
        gpu(out=out, minutes=0.01, steps=1, tiny=True, only=["taco"])
