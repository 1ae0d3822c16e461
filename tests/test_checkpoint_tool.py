"""`taco checkpoint`: what it lists, what it proves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_checkpoint import every_file, manifest, write_state

from pretrain.checkpoint import CheckpointStore, list_checkpoints
from pretrain.checkpoint_tool import app
from pretrain.cli import run_program


@pytest.fixture
def run(tmp_path: Path) -> Path:
    store = CheckpointStore(tmp_path / "checkpoints", keep=3)
    store.prepare()
    for step in (10, 20):
        store.save(manifest(step), write_state)
    return tmp_path


def tool(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        run_program(app, arguments)
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out + captured.err


def test_ls_shows_the_newest_first(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output = tool(capsys, "ls", str(run), "--json")
    assert code == 0
    rows = json.loads(output)
    assert [(row["step"], row["consumed_samples"], row["state"]) for row in rows] == [
        (20, 320, "complete"),
        (10, 160, "complete"),
    ]
    assert rows[0]["num_bytes"] > 10_000
    assert "step-0000020" in tool(capsys, "ls", str(run))[1]


def test_verify_proves_good_and_names_bad(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool(capsys, "verify", str(run))[0] == 0
    victim = every_file(list_checkpoints(run / "checkpoints")[1])[0]
    victim.write_bytes(b"x" + victim.read_bytes()[1:])
    code, output = tool(capsys, "verify", str(run))
    assert code == 1
    assert "step-0000020: good" in output
    assert "step-0000010: BAD" in output
    assert str(victim) in output


def test_a_folder_without_checkpoints_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output = tool(capsys, "ls", str(tmp_path))
    assert code == 1
    assert "no checkpoint here" in output


def test_ls_takes_a_copy_under_another_name(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = list_checkpoints(run / "checkpoints")[0].rename(run / "step-backup")
    code, output = tool(capsys, "ls", str(copy), "--json")
    assert code == 0
    assert json.loads(output)[0]["step"] == 20
