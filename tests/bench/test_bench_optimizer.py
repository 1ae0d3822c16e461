"""The optimizer benchmark: every contender takes the same steps, and the report holds medians and ratios."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pretrain.bench.optimizer import app
from pretrain.bench.optimizer_contenders import Problem, build_problem, build_step, measure

SHAPE = {
    "num_layers": 1,
    "hidden_size": 16,
    "vocab_size": 40,
    "precision": "fp32",
    "device": "cpu",
    "threads": 1,
    "steps": 2,
}


def after_steps(contender: str) -> Problem:
    problem = build_problem(SHAPE)
    step = build_step(contender, problem)
    with torch.no_grad():
        for _ in range(3):
            step()
    return problem


@pytest.mark.parametrize(("name", "peer"), [("adamw", "adamw-torch"), ("lamb", "lamb-loop")])
def test_contenders_take_the_same_steps(name: str, peer: str) -> None:
    found, expected, before = after_steps(name), after_steps(peer), build_problem(SHAPE)
    for weight, other, old in zip(found.weights, expected.weights, before.weights, strict=True):
        assert torch.allclose(weight, other, rtol=1e-4, atol=1e-7)
        assert not torch.equal(weight, old)


def test_an_answer_has_the_time_of_every_step() -> None:
    answer = measure("lamb", SHAPE)
    assert len(answer["seconds"]) == 2
    assert answer["num_parameters"] == sum(weight.numel() for weight in build_problem(SHAPE).weights)


@pytest.mark.slow
def test_report_of_a_quick_run(tmp_path: Path) -> None:
    out = tmp_path / "optimizer.json"
    arguments = ["--num-layers=1", "--hidden-size=16", "--vocab-size=40", "--steps=1", "--rounds=1", f"--out={out}"]
    answer = CliRunner().invoke(app, [*arguments, "--only=lamb", "--only=lamb-loop"])
    assert answer.exit_code == 0, answer.output
    report = json.loads(out.read_text())
    assert set(report["seconds"]) == {"lamb", "lamb-loop"}
    assert report["ratios"]["lamb_over_lamb-loop"] > 0
    assert "lamb / lamb-loop" in answer.output


def test_an_unknown_contender_is_refused() -> None:
    answer = CliRunner().invoke(app, ["--only=sgd"])
    assert "--only sgd: there is no such contender; choose from adamw, adamw-torch" in str(answer.exception)
