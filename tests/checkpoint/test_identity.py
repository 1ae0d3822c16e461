"""Which checkpoints belong to a run, and what a run knows of its saves."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoint_builders import manifest, write_state
from reading_rights import unreadable

from pretrain.checkpoint.identity import check_configuration, check_identity
from pretrain.checkpoint.manifest import CheckpointManifest
from pretrain.checkpoint.run_record import ALLOWS_OTHER_RUN, RunRecord, find_own_checkpoint, note_saved, recorded_step
from pretrain.checkpoint.start_check import find_start
from pretrain.checkpoint.store import CheckpointStore
from pretrain.config.load import dump_config
from pretrain.config.sections import RunConfig
from pretrain.errors import CheckpointError, ConfigError, TacoError

EXPECTED = replace(manifest(0), run_id="ours")


def config(**sections: object) -> RunConfig:
    return RunConfig.model_validate({"run": {"output_dir": "run"}, "data": {"train": ["x"]}, **sections})


def saved(folder: Path, run_id: str, **sections: object) -> Path:
    """A checkpoint of step 10 of the run `run_id`, with its configuration."""
    (folder / "config.yaml").write_text(dump_config(config(**sections)))
    store = CheckpointStore(folder / "checkpoints", keep=9)
    store.prepare()
    return store.save(replace(manifest(10), run_id=run_id), write_state, [folder / "config.yaml"])


def check(folder: Path, *allowed: str) -> None:
    check_identity(folder, CheckpointManifest.load(folder), EXPECTED, config(), allowed)
    check_configuration(folder, CheckpointManifest.load(folder), EXPECTED, config(), allowed)


def test_the_runs_own_checkpoint_is_taken_also_after_a_change_that_was_allowed(tmp_path: Path) -> None:
    check(saved(tmp_path, "ours", optim={"lr": 0.5}))


@pytest.mark.fault("foreign-checkpoint")
def test_checkpoints_without_their_run_are_not_continued_with_another_configuration(tmp_path: Path) -> None:
    folder = saved(tmp_path, "ours", optim={"lr": 0.5})
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"no .*config\.yaml\n  - optim\.lr: 0\.5 -> 0\.0001\n.*--allow-change KEY"):
        check(folder)
    check(folder, "optim.lr")


def test_a_checkpoint_of_a_release_without_names_is_taken_if_its_configuration_fits(tmp_path: Path) -> None:
    check(saved(tmp_path, "", train={"log_every": 3}))
    folder = saved(tmp_path, "", optim={"lr": 0.5})
    with pytest.raises(CheckpointError, match=r"another run, without a name.*optim\.lr: 0\.5 -> 0\.0001"):
        check(folder)
    check(folder, "optim.lr")


@pytest.mark.fault("foreign-checkpoint")
def test_a_checkpoint_of_another_run_is_refused_or_taken_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(tmp_path, "theirs", run={"output_dir": "other", "seed": 8})
    with pytest.raises(CheckpointError) as caught:
        check(folder, "run")
    message = f"{folder}: was saved by another run, theirs, than this one, ours (run.seed: 8 -> 1234)"
    assert message not in str(caught.value)  # the seed was allowed to change
    with pytest.raises(CheckpointError, match="--allow-change checkpoint.run") as caught:
        check(folder)
    assert message in str(caught.value)
    check(folder, ALLOWS_OTHER_RUN)
    assert message in caplog.text


@pytest.mark.fault("foreign-checkpoint")
def test_a_renamed_checkpoint_is_refused_with_both_steps(tmp_path: Path) -> None:
    folder = saved(tmp_path, "ours").rename(tmp_path / "checkpoints" / "step-9999999")
    with pytest.raises(CheckpointError, match=r"is named step 9999999, and its manifest says step 10; rename it to"):
        check(folder)
    check(folder, ALLOWS_OTHER_RUN)


def test_imported_weights_among_the_checkpoints_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, "")
    with pytest.raises(CheckpointError, match=r"holds weights only.*run\.init_from="):
        check_identity(folder, replace(manifest(10), kind="weights"), EXPECTED, config(), [ALLOWS_OTHER_RUN])


def test_a_run_keeps_its_name_and_remembers_its_saves(tmp_path: Path) -> None:
    record = RunRecord.of(tmp_path)
    assert (RunRecord.of(tmp_path), recorded_step(tmp_path)) == (record, 0)
    note_saved(tmp_path, record.run_id, 40)
    assert (RunRecord.of(tmp_path).run_id, recorded_step(tmp_path)) == (record.run_id, 40)


def test_a_record_that_was_removed_is_made_again_from_the_newest_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, "ours")
    assert RunRecord.of(tmp_path).run_id == "ours"


def test_runs_of_releases_without_a_record_have_other_records_of_their_saves(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 9, "loss": 1}\n{"step": 6, "save_write_seconds": 0.1}\n')
    assert recorded_step(tmp_path) == 6
    (tmp_path / "done.json").write_text('{"step": 8}')
    assert recorded_step(tmp_path) == 8


@pytest.mark.parametrize("text", ["", "{", "[]", '{"run_id": "x"}', '{"run_id": "", "saved_step": 1, "saved_at": ""}'])
def test_a_damaged_record_is_an_error_with_a_remedy_that_works(tmp_path: Path, text: str) -> None:
    saved(tmp_path, "ours")
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(TacoError, match=r"run\.json: is no record of a run .*; remove it"):
        RunRecord.of(tmp_path)
    path.unlink()
    assert RunRecord.of(tmp_path).run_id == "ours"


@pytest.mark.fault("unreadable")
@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "done.json"])
def test_a_record_that_may_not_be_read_is_no_reason_to_begin_again(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(json.dumps({"step": 8}))
    with unreadable(tmp_path / name), pytest.raises(TacoError, match=rf"{name}: cannot be read: Permission denied$"):
        recorded_step(tmp_path)


@pytest.mark.fault("foreign-checkpoint")
def test_the_newest_checkpoint_of_a_run_is_not_one_that_was_renamed_or_copied_in(tmp_path: Path) -> None:
    folder = saved(tmp_path, "ours")
    assert find_own_checkpoint(tmp_path) == folder  # no record says whose it is
    assert RunRecord.of(tmp_path).run_id == "ours"
    assert find_own_checkpoint(tmp_path) == folder
    foreign = folder.with_name("step-0000020")
    shutil.copytree(folder, foreign)
    with pytest.raises(CheckpointError, match=r"step-0000020: is the newest here, but its manifest says step 10"):
        find_own_checkpoint(tmp_path)
    assert find_own_checkpoint(foreign) == foreign  # named by itself
    (foreign / "manifest.json").write_text(replace(manifest(20), run_id="theirs").to_json())
    with pytest.raises(CheckpointError, match="step 20 of run theirs, and this is run ours; move it elsewhere"):
        find_own_checkpoint(tmp_path / "checkpoints")
    with pytest.raises(ConfigError, match=r"run\.init_from .*step-0000020: is the newest here"):
        find_start(tmp_path)
