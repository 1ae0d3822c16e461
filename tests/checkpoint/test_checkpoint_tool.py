"""`taco checkpoint`: what it lists, what it proves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_builders import every_file, manifest, write_state
from reading_rights import unreadable
from state_ranges import write

from pretrain.checkpoint.__main__ import app
from pretrain.checkpoint.manifest import CheckpointManifest, find_checkpoint, find_problems, list_checkpoints
from pretrain.checkpoint.run_record import RunRecord
from pretrain.checkpoint.state_files import MOMENTS, WEIGHT, Range, StateReader, read_counters, write_counters
from pretrain.checkpoint.store import CheckpointStore
from pretrain.checkpoint.weights import read_weights
from pretrain.cli import run_program
from pretrain.durable import FileRecord
from pretrain.model.parameter_shape import ParameterShape

KINDS = (WEIGHT, *MOMENTS)


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


@pytest.fixture
def long_run(tmp_path: Path) -> Path:
    """Checkpoints of the steps 10, 20, ... 60."""
    store = CheckpointStore(tmp_path / "checkpoints", keep=10)
    store.prepare()
    for step in range(10, 70, 10):
        store.save(manifest(step), write_state)
    return tmp_path


def steps_of(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(run / "checkpoints")]


def test_prune_keeps_the_newest_and_every_nth(long_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output = tool(capsys, "prune", str(long_run), "--keep", "2", "--every", "30", "--dry-run")
    assert code == 0
    assert output.count("would remove") == 3
    assert steps_of(long_run) == [60, 50, 40, 30, 20, 10]
    assert tool(capsys, "prune", str(long_run), "--keep", "2", "--every", "30")[0] == 0
    assert steps_of(long_run) == [60, 50, 30]
    assert tool(capsys, "prune", str(long_run), "--keep", "1")[0] == 0
    assert steps_of(long_run) == [60]


def test_prune_never_removes_the_last_good_one(long_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = list_checkpoints(long_run / "checkpoints")
    for folder in folders[:3]:
        victim = every_file(folder)[0]
        victim.write_bytes(b"x" + victim.read_bytes()[1:])
    code, output = tool(capsys, "prune", str(long_run), "--keep", "2")
    assert code == 0
    assert "step-0000030 is the newest good one" in output
    assert steps_of(long_run) == [60, 50, 30]
    for file in every_file(folders[3]):
        file.write_bytes(b"x" + file.read_bytes()[1:])
    code, output = tool(capsys, "prune", str(long_run), "--keep", "1")
    assert (code, "no checkpoint is good" in output) == (1, True)
    assert steps_of(long_run) == [60, 50, 30]


def test_a_run_keeps_every_nth_too(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=1, keep_every=20)
    store.prepare()
    for step in range(10, 60, 10):
        store.save(manifest(step), write_state)
    assert steps_of(tmp_path) == [50, 40, 20]


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A run with one checkpoint of a real state, in two files, and a tokenizer."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.txt").write_text("x")
    shape = ParameterShape((5, 3), split_dim=0)
    full = torch.arange(15.0).view(5, 3)

    def write_state_files(folder: Path) -> list[FileRecord]:
        parts = [shape.part_of(full, part, 2).flatten() for part in range(2)]
        records = [
            write(folder, part, [(Range(kind, "w", part, 2, 0, 9), parts[part]) for kind in KINDS], {"w": shape})
            for part in range(2)
        ]
        return [*records, write_counters(folder, {"optimizer_steps": 30})]

    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep=3)
    store.prepare()
    store.save(manifest(30), write_state_files, (tmp_path / "tokenizer",))
    return tmp_path / "run"


@pytest.mark.parametrize("num_files", [1, 2, 4, 20])
def test_reshape_keeps_every_value(trained: Path, capsys: pytest.CaptureFixture[str], num_files: int) -> None:
    out = trained / "out"
    code, output = tool(capsys, "reshape", str(trained), str(out), "--files", str(num_files))
    assert code == 0, output
    (folder,) = list_checkpoints(out)
    assert find_problems(folder) == []
    assert (folder / "tokenizer" / "vocab.txt").read_text() == "x"
    assert read_counters(folder) == {"optimizer_steps": 30}
    assert len(list((folder / "state").glob("rank-*"))) == num_files
    before = CheckpointManifest.load(find_checkpoint(trained))
    assert replace(CheckpointManifest.load(folder), files=()) == replace(before, files=())
    with StateReader(folder) as reader:
        for kind in KINDS:
            assert torch.equal(reader.read_full("w", kind), torch.arange(15.0).view(5, 3))


def test_reshape_to_weights_alone(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool(capsys, "reshape", str(trained), str(trained / "out"), "--weights-only")[0] == 0
    (folder,) = list_checkpoints(trained / "out")
    assert CheckpointManifest.load(folder).kind == "weights"
    assert torch.equal(read_weights(folder)["w"], torch.arange(15.0).view(5, 3))
    code, output = tool(capsys, "reshape", str(folder), str(trained / "again"))
    assert code == 1
    assert "holds weights only" in output


def test_reshape_leaves_nothing_of_a_damaged_checkpoint(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (trained / "there").mkdir()
    code, output = tool(capsys, "reshape", str(trained), str(trained / "there"))
    assert (code, "exists; choose a new folder" in output) == (1, True)
    victim = find_checkpoint(trained) / "state" / "rank-00001.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    code, output = tool(capsys, "reshape", str(trained), str(trained / "out"))
    assert (code, str(victim) in output) == (1, True)
    assert not (trained / "out").exists()


@pytest.mark.fault("unreadable")
def test_what_may_not_be_read_is_one_line_of_every_verb(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = find_checkpoint(run)
    manifest_file, state_file = newest / "manifest.json", every_file(newest)[1]
    reading = {"ls": manifest_file, "verify": state_file, "prune": state_file, "reshape": state_file}
    for verb, path in reading.items():
        arguments = [verb, str(run), *([str(run / "out")] if verb == "reshape" else [])]
        with unreadable(path):
            code, output = tool(capsys, *arguments)
        assert (code, output.count("error: ")) == (1, 1), output
        assert f"error: {path}: cannot be read: Permission denied" in output
        with unreadable(run / "checkpoints"):
            code, output = tool(capsys, *arguments)
        assert (code, output.count("\n")) == (1, 1), output
        assert "cannot be read: Permission denied" in output
    assert steps_of(run) == [20, 10]
    assert not (run / "out").exists()


def test_what_may_not_be_read_is_neither_good_nor_bad(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with unreadable(find_checkpoint(run) / "manifest.json"):
        verified, listed = tool(capsys, "verify", str(run))[1], tool(capsys, "ls", str(run))[1]
    assert "step-0000020: not verified" in verified
    assert "step-0000010: good" in verified
    assert "BAD" not in verified
    assert "unreadable" in listed
    (find_checkpoint(run) / "manifest.json").write_text("{")
    code, listed = tool(capsys, "ls", str(run))
    assert (code, "damaged" in listed) == (0, True)


def test_prune_leaves_the_neighbours_of_a_checkpoint_that_is_named_itself(
    long_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = steps_of(long_run)
    folder = list_checkpoints(long_run / "checkpoints")[0]
    code, output = tool(capsys, "prune", str(folder), "--keep", "1")
    assert (code, steps_of(long_run)) == (1, before)
    assert f"{folder}: is one checkpoint; name the folder of its run" in output


@pytest.mark.fault("foreign-checkpoint")
@pytest.mark.parametrize("given", ["run", ".", "link"])
def test_prune_counts_and_removes_only_the_runs_own(
    given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = RunRecord.of(tmp_path)
    store = CheckpointStore(tmp_path / "checkpoints", keep=9)
    store.prepare()
    for step, run_id in ((10, record.run_id), (20, record.run_id), (30, ""), (40, "another"), (50, record.run_id)):
        store.save(replace(manifest(step), run_id=run_id), write_state)
    (store.root / "step-0000050").rename(store.root / "step-9999999")
    (tmp_path / "link").symlink_to(store.root)
    monkeypatch.chdir(store.root)
    places = {"run": str(tmp_path), ".": ".", "link": str(tmp_path / "link")}
    code, output = tool(capsys, "prune", places[given], "--keep", "1")
    assert (code, output.count("does not count")) == (0, 2), output
    assert steps_of(tmp_path) == [9999999, 40, 30]
