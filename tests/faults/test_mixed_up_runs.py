"""A run whose checkpoints, data or tokenizer are gone or not its own: it says so before it does anything."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
from forked import run_ranks
from reading_rights import unreadable
from small_runs import write_cyclic_dataset, write_small_run

from pretrain.checkpoint import store
from pretrain.checkpoint.manifest import CheckpointManifest, list_checkpoints
from pretrain.cli import run_program
from pretrain.train import app

pytestmark = pytest.mark.slow

SETTINGS = {"train__steps": 4, "optim__warmup_steps": 1, "train__eval_every": 100, "checkpoint": {"every_steps": 2}}


def train(config: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and output of one rank of `taco train`, in a process of its own that does not wait long for files."""

    def program() -> tuple[int, str]:
        store.WAITS = (0.01,)
        output = io.StringIO()
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            try:
                run_program(app, ["--config", str(config), *arguments])
            except SystemExit as ended:
                return int(ended.code or 0), output.getvalue()

    return run_ranks(1, program)[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration, the data and the complete run of four steps."""
    folder = tmp_path_factory.mktemp("trained")
    code, output = train(write_small_run(folder, **SETTINGS))
    assert code == 0, output
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, with a configuration beside it: it goes on in another place."""
    shutil.copytree(trained / "run", tmp_path / "run")
    text = (trained / "run.yaml").read_text().replace(f"output_dir: {trained}", f"output_dir: {tmp_path}")
    (tmp_path / "run.yaml").write_text(text.replace("steps: 4", "steps: 6"))
    return tmp_path / "run"


def go_on(run: Path, *arguments: str) -> tuple[int, str]:
    return train(run.parent / "run.yaml", "--allow-change", "train.steps", *arguments)


def names_of(run: Path) -> list[str]:
    return [path.name for path in list_checkpoints(run / "checkpoints")]


def test_a_run_that_was_copied_to_another_place_goes_on(run: Path) -> None:
    code, output = go_on(run)
    assert (code, names_of(run)[0]) == (0, "step-0000006"), output
    record = json.loads((run / "run.json").read_text())
    assert record["saved_step"] == 6
    assert CheckpointManifest.load(list_checkpoints(run / "checkpoints")[0]).run_id == record["run_id"] != ""


@pytest.mark.fault("foreign-checkpoint")
@pytest.mark.parametrize("has_record", [True, False])
def test_a_run_that_has_saved_does_not_begin_again_by_itself(run: Path, has_record: bool) -> None:
    (run / "checkpoints").rename(run.parent / "unmounted")
    if not has_record:
        (run / "run.json").unlink()  # as in runs of older releases
    code, output = go_on(run)
    assert code == 1, output
    (line,) = [text for text in output.splitlines() if text.startswith("error:")]
    assert "holds no checkpoint, but the run has saved step 4; mount or restore the folder" in line
    assert names_of(run) == []
    if has_record:
        code, output = go_on(run, "--from-scratch")
        assert (code, names_of(run)[0]) == (0, "step-0000006"), output
        assert "beginning at step 0, as asked" in output


@pytest.mark.fault("foreign-checkpoint")
def test_a_checkpoint_of_another_run_is_refused_and_nothing_changes(run: Path, trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    config = write_small_run(other, **SETTINGS, run__seed=8, data__train=[str(trained / "train")])
    code, output = train(config, f"data.validation=[{trained / 'validation'}]")
    assert code == 0, output
    shutil.copytree(other / "run" / "checkpoints" / "step-0000004", run / "checkpoints" / "step-0000005")
    before = (run / "config.yaml").read_text()
    code, output = go_on(run)
    assert code == 1, output
    assert "is named step 5, and its manifest says step 4" in output
    (run / "checkpoints" / "step-0000005").rename(run / "aside")
    shutil.rmtree(run / "checkpoints" / "step-0000004")
    (run / "aside").rename(run / "checkpoints" / "step-0000004")
    code, output = go_on(run)
    assert code == 1, output
    assert "was saved by another run" in output
    assert "run.seed: 8 -> 7" in output
    assert (run / "config.yaml").read_text() == before
    code, output = go_on(run, "--allow-change", "checkpoint.run")
    assert (code, names_of(run)) == (0, ["step-0000006", "step-0000004", "step-0000002"]), output
    assert "continuing all the same, as allowed (--allow-change checkpoint.run)" in output


@pytest.mark.fault("unreadable")
def test_a_checkpoint_that_may_not_be_read_ends_the_start_with_one_line(run: Path) -> None:
    victim = run / "checkpoints" / "step-0000004" / "manifest.json"
    with unreadable(victim):
        code, output = go_on(run)
    errors = [text for text in output.splitlines() if text.startswith("error:")]
    assert (code, len(errors)) == (1, 1), output
    assert f"{victim}: cannot be read: Permission denied" in errors[0]
    assert names_of(run) == ["step-0000004", "step-0000002"]


@pytest.mark.fault("changed-run")
def test_a_run_without_a_checkpoint_takes_the_tokenizer_of_its_data(tmp_path: Path) -> None:
    """It ended before its first checkpoint, and the data were made again under the same prefix."""
    config = write_small_run(tmp_path, **SETTINGS)
    old = tmp_path / "run" / "tokenizer"
    shutil.copytree(tmp_path / "train.tokenizer", old)
    (tmp_path / "run" / "run.lock").touch()
    write_cyclic_dataset(tmp_path / "train", seed=1, words="other")
    write_cyclic_dataset(tmp_path / "validation", seed=2, words="other")
    code, output = train(config)
    assert code == 0, output
    assert "was not the tokenizer of data.train, and is replaced by it" in output
    expected = (tmp_path / "train.tokenizer" / "vocab.txt").read_bytes()
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[0]
    for folder in (old, newest / "tokenizer"):
        assert (folder / "vocab.txt").read_bytes() == expected


@pytest.mark.fault("data-size")
def test_other_content_of_the_same_size_is_found_before_the_first_step(run: Path, trained: Path) -> None:
    path = trained / "train.bin"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    try:
        code, output = go_on(run)
    finally:
        path.write_bytes(content)
    assert code == 1, output
    assert f"error: {path}: chunk 0, bytes 0 to {len(content)}: differ from what was written" in output
