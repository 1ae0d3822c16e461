"""The index benchmark: every contender answers, and what can be compared with megatron-core or NumPy is equal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pretrain.bench.index import CONTENDERS, app, table
from pretrain.bench.index_contenders import measure


@pytest.mark.parametrize("contender", CONTENDERS)
def test_every_contender_answers(contender: str) -> None:
    found = measure(contender, 20_000, 2_000, 10_000, 0.0)
    assert found["rows"] > 0
    assert found["bytes_per_row"] >= 0
    assert found["is_equal"] in (True, None)
    if contender in ("taco-stream", "taco-document", "taco-order"):
        assert found["is_equal"] is True


@pytest.mark.slow
def test_report_of_a_quick_run(tmp_path: Path) -> None:
    out = tmp_path / "index.json"
    answer = CliRunner().invoke(app, ["--quick", "--json", "--out", str(out)])
    assert answer.exit_code == 0, answer.output
    report = json.loads(out.read_text())
    assert set(report["nanoseconds_per_row"]) == set(report["bytes_per_row"]) == set(CONTENDERS)
    assert all(report["is_equal"].values())
    assert all(value > 0 for value in report["ratios"].values())
    assert "differ from the version they are held against: none" in table(report)
