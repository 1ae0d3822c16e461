"""The commit protocol of checkpoints: what is found, refused, kept aside and pruned."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_builders import every_file, is_unchanged, manifest, write_state
from forked import run_ranks
from reading_rights import unreadable

from pretrain import durable
from pretrain.checkpoint import store as checkpoint_module
from pretrain.checkpoint.manifest import (
    FORMAT_VERSION,
    CheckpointManifest,
    CheckpointUnreadableError,
    find_checkpoint,
    find_problems,
    list_checkpoints,
    list_set_aside,
    step_folder,
)
from pretrain.checkpoint.store import CheckpointStore
from pretrain.durable import FileRecord
from pretrain.errors import CheckpointError
from pretrain.parallel import collectives
from pretrain.parallel.launch import read_launch, start_process_group


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CheckpointStore:
    """A store that does not wait long for files to appear."""
    monkeypatch.setattr(checkpoint_module, "WAITS", (0.05, 0.05, 0.1))
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    store.prepare()
    return store


def save(store: CheckpointStore, *steps: int) -> Path:
    for step in steps:
        folder = store.save(manifest(step), write_state)
    return folder


def test_a_saved_checkpoint_is_found_and_good(store: CheckpointStore, tmp_path: Path) -> None:
    folder = save(store, 10)
    assert find_checkpoint(tmp_path) == find_checkpoint(store.root) == find_checkpoint(folder) == folder
    assert find_problems(folder) == []
    assert CheckpointManifest.load(folder).consumed_samples == 160
    assert store.newest_good() == folder


def test_older_ones_are_pruned_and_the_newest_is_named(store: CheckpointStore) -> None:
    save(store, 10, 20, 30)
    assert [path.name for path in list_checkpoints(store.root)] == ["step-0000030", "step-0000020"]
    assert (store.root / "latest").read_text() == "step-0000030\n"


def test_extra_files_and_folders_are_part_of_the_checkpoint(store: CheckpointStore, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.txt").write_text("[PAD]")
    (tmp_path / "config.yaml").write_text("run: {}")
    folder = store.save(manifest(1), write_state, (tmp_path / "config.yaml", tmp_path / "tokenizer"))
    names = [record.name for record in CheckpointManifest.load(folder).files]
    assert names == [
        "config.yaml",
        "state/rank-00000.safetensors",
        "state/rank-00001.safetensors",
        "tokenizer/vocab.txt",
    ]


@pytest.mark.fault("damaged-checkpoint")
@pytest.mark.parametrize("seed", range(25))
def test_one_flipped_bit_anywhere_is_found(store: CheckpointStore, seed: int) -> None:
    folder = save(store, 10)
    rng = random.Random(seed)
    victim = rng.choice(every_file(folder))
    content = bytearray(victim.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    victim.write_bytes(content)
    (problem,) = find_problems(folder)
    assert str(victim) in problem


def test_a_bit_flipped_in_the_manifest_itself_is_found(store: CheckpointStore) -> None:
    path = save(store, 10) / "manifest.json"
    content = path.read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        assert is_unchanged(flipped, content) or find_problems(path.parent), (place, flipped)


@pytest.mark.fault("damaged-checkpoint")
def test_truncated_and_missing_files_are_found(store: CheckpointStore) -> None:
    folder = save(store, 10)
    first, second = every_file(folder)
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    problems = find_problems(folder)
    assert f"{first}: expected 5000 bytes, found 4999" in problems
    assert f"{second}: is missing" in problems


def test_shares_of_all_ranks_cover_every_file(store: CheckpointStore) -> None:
    folder = save(store, 10)
    for victim in every_file(folder):
        victim.write_bytes(b"other")
    assert [len(find_problems(folder, part=part, num_parts=2)) for part in (0, 1)] == [1, 1]


@pytest.mark.fault("damaged-checkpoint")
def test_a_bad_checkpoint_is_kept_aside_and_the_previous_one_used(store: CheckpointStore) -> None:
    save(store, 10, 20)
    every_file(step_folder(store.root, 20))[0].unlink()
    assert store.newest_good() == step_folder(store.root, 10)
    assert (store.root / "step-0000020.bad").is_dir()


@pytest.mark.fault("no-good-checkpoint")
def test_only_bad_checkpoints_are_a_refusal_not_a_fresh_start(store: CheckpointStore) -> None:
    save(store, 10, 20)
    for folder in list_checkpoints(store.root):
        every_file(folder)[0].unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is good"):
        store.newest_good()
    # The second start finds them set aside, and still must not begin at step 0.
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint is good.*step-0000010\.bad"):
        store.newest_good()


@pytest.mark.fault("latest")
@pytest.mark.parametrize("content", ["", "step-0000099\n", None])
def test_latest_is_only_a_hint(store: CheckpointStore, content: str | None) -> None:
    folder = save(store, 10)
    if content is None:
        (store.root / "latest").unlink()
    else:
        (store.root / "latest").write_text(content)
    assert store.newest_good() == folder


@pytest.mark.fault("kill-in-save")
def test_an_interrupted_save_is_ignored_and_removed(store: CheckpointStore) -> None:
    good = save(store, 10)
    left_over = store.root / "step-0000020.tmp"
    shutil.copytree(good, left_over)
    assert store.newest_good() == good
    store.prepare()
    assert not left_over.exists()


@pytest.mark.fault("full-disk")
def test_a_failed_write_leaves_the_earlier_checkpoint(store: CheckpointStore) -> None:
    good = save(store, 10)

    def full(folder: Path) -> list[FileRecord]:
        write_state(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"not saved, earlier checkpoints are untouched: rank 0.*No space"):
        store.save(manifest(20), full)
    assert [path.name for path in store.root.iterdir() if path.is_dir()] == [good.name]
    assert find_problems(good) == []


@pytest.mark.fault("full-disk")
def test_a_failed_commit_leaves_the_earlier_checkpoint(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    good = save(store, 10)

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module.durable, "write_text", full)
    with pytest.raises(CheckpointError, match="No space"):
        save(store, 20)
    assert list_checkpoints(store.root) == [good]


@pytest.mark.fault("malicious")
def test_a_manifest_cannot_point_outside_its_folder(store: CheckpointStore, tmp_path: Path) -> None:
    folder = save(store, 10)
    (tmp_path / "secret").write_text("x")
    path = folder / "manifest.json"
    forged = replace(CheckpointManifest.load(folder), files=(FileRecord("../../secret", 1, "00"),))
    path.write_text(forged.to_json())
    assert any("outside the checkpoint" in problem for problem in find_problems(folder))


@pytest.mark.fault("damaged-checkpoint")
@pytest.mark.parametrize("text", ["", "{", "[]", '{"format_version": 1}', '{"format_version": 99}'])
def test_a_damaged_manifest_is_a_typed_error(store: CheckpointStore, text: str) -> None:
    folder = save(store, 10)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        CheckpointManifest.load(folder)
    assert len(find_problems(folder)) == 1


def test_nothing_there_says_why(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder; give a step-NNNNNNN folder"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="expected a step-NNNNNNN folder"):
        find_checkpoint(tmp_path)
    (tmp_path / "run.lock").touch()
    with pytest.raises(CheckpointError, match="it has not saved yet, or its checkpoints/ is not mounted"):
        find_checkpoint(tmp_path)
    (tmp_path / "checkpoints" / "step-0000010.bad").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"but those that failed their verification \(step-0000010\.bad\)"):
        find_checkpoint(tmp_path)


def test_another_release_is_refused_and_nothing_is_set_aside(store: CheckpointStore) -> None:
    folder = save(store, 10)
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace(f'"format_version": {FORMAT_VERSION}', '"format_version": 99'))
    with pytest.raises(CheckpointError, match="continue with the release that wrote it"):
        store.newest_good()
    assert folder.is_dir()


def test_what_fails_after_the_commit_does_not_undo_it(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def forbidden(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(checkpoint_module, "remove_checkpoint", forbidden)
    newest = save(store, 10, 20, 30)
    assert find_problems(newest) == []
    assert store.newest_good() == newest
    assert "step-0000030: is saved, but `latest` or an old checkpoint" in caplog.text


def test_saving_a_step_again_replaces_it_and_leaves_nothing_beside(store: CheckpointStore) -> None:
    save(store, 10)
    again = save(store, 10)
    assert find_problems(again) == []
    assert [path.name for path in store.root.iterdir() if path.is_dir()] == [again.name]


# -- a file that cannot be read, is late, or was set aside -----------------------------------------------------------


@pytest.mark.fault("unreadable")
@pytest.mark.parametrize("name", ["manifest.json", "state/rank-00001.safetensors", "state", "."])
def test_what_may_not_be_read_is_named_and_nothing_is_set_aside(store: CheckpointStore, name: str) -> None:
    good, folder = save(store, 10), save(store, 20)
    with unreadable(folder / name), pytest.raises(CheckpointUnreadableError, match="cannot be read: Permission denied"):
        store.newest_good()
    assert list_checkpoints(store.root) == [folder, good]
    assert store.newest_good() == folder


@pytest.mark.fault("unreadable")
def test_a_folder_of_checkpoints_that_may_not_be_listed_is_not_empty(store: CheckpointStore) -> None:
    folder = save(store, 10)
    with unreadable(store.root), pytest.raises(CheckpointUnreadableError, match=f"{store.root}: cannot be read"):
        store.newest_good()
    assert store.newest_good() == folder


@pytest.mark.fault("unreadable")
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_errors_of_the_system_are_no_damage(
    store: CheckpointStore, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(store, 10)

    def fail(path: Path, folder: Path) -> FileRecord:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(durable, "record_of", fail)
    with pytest.raises(CheckpointUnreadableError, match=rf"rank-00000.*cannot be read: {os.strerror(number)}"):
        store.newest_good()
    assert folder.is_dir()


def look_on_two_ranks(root: Path) -> str:
    """What each rank raises when only the second one may not read the checkpoint."""
    start_process_group(read_launch(), torch.device("cpu"))
    victim = step_folder(root, 10) / "state" / "rank-00001.safetensors"
    with unreadable(victim) if collectives.rank() == 1 else contextlib.nullcontext():
        collectives.gather_objects(None)
        try:
            CheckpointStore(root, keep=2).newest_good()
        except CheckpointUnreadableError as error:
            return str(error)
    return "nothing"


@pytest.mark.fault("unreadable")
def test_all_ranks_end_with_the_same_line_if_one_cannot_read(store: CheckpointStore) -> None:
    folder = save(store, 10)
    first, second = run_ranks(2, look_on_two_ranks, store.root)
    assert first == second
    assert first.startswith(f"rank 1: {folder}/state/rank-00001.safetensors: cannot be read: Permission denied")
    assert folder.is_dir()


@pytest.mark.fault("unreadable")
def test_a_link_to_a_file_system_that_is_not_mounted_is_no_damage(store: CheckpointStore, tmp_path: Path) -> None:
    folder = save(store, 10)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert store.newest_good() == folder
    (tmp_path / "elsewhere").rename(tmp_path / "unmounted")
    with pytest.raises(CheckpointUnreadableError, match=r"is a link to .*elsewhere, which is not there; mount that"):
        store.newest_good()


def test_checkpoints_may_lie_on_another_file_system(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "other")
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep=1)
    store.prepare()
    save(store, 10, 20)
    assert [path.name for path in list_checkpoints(tmp_path / "other")] == ["step-0000020"]
    (tmp_path / "other").rename(tmp_path / "unmounted")
    with pytest.raises(CheckpointError, match=r"is a link to .*other, which is not there; mount that"):
        store.prepare()


@pytest.mark.fault("late-file")
@pytest.mark.parametrize(
    ("name", "is_cut"),
    [("manifest.json", False), ("manifest.json", True), ("state/rank-00000.safetensors", True), ("state", False)]
    + [(".", False)],
)
def test_what_a_network_file_system_shows_late_is_waited_for(store: CheckpointStore, name: str, is_cut: bool) -> None:
    folder = save(store, 10)
    late, hidden = folder / name, store.root / "hidden"
    late.rename(hidden)
    if is_cut:
        late.write_bytes(hidden.read_bytes()[:7])
    timer = threading.Timer(0.07, lambda: hidden.replace(late))
    timer.start()
    assert store.wait_for(10)
    assert store.newest_good() == folder
    timer.join()
    assert not list_set_aside(store.root)


@pytest.mark.fault("late-file")
def test_one_start_waits_once_for_all_files_and_not_for_wrong_content(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(checkpoint_module.time, "sleep", waited.append)
    save(store, 10, 20)
    for folder in list_checkpoints(store.root):
        every_file(folder)[0].unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is good"):
        store.newest_good()
    assert waited == list(checkpoint_module.WAITS)
    again = CheckpointStore(store.root, keep=2)
    every_file(save(again, 30))[0].write_bytes(bytes(5000))
    waited.clear()
    with pytest.raises(CheckpointError, match="no checkpoint is good"):
        again.newest_good()
    assert waited == []


@pytest.mark.fault("late-file")
def test_what_was_set_aside_is_taken_again_when_it_verifies(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    save(store, 10, 20)
    victim = every_file(step_folder(store.root, 20))[0]
    content = victim.read_bytes()
    victim.unlink()
    assert store.newest_good() == step_folder(store.root, 10)
    (store.root / "step-0000020.bad" / victim.relative_to(step_folder(store.root, 20))).write_bytes(content)
    assert store.newest_good() == step_folder(store.root, 20)
    assert "step-0000020.bad verifies, and is used again as step-0000020" in caplog.text
    assert not list_set_aside(store.root)


def test_setting_aside_a_step_twice_keeps_both(store: CheckpointStore) -> None:
    for _ in range(2):
        save(store, 10, 20)
        every_file(step_folder(store.root, 20))[0].unlink()
        assert store.newest_good() == step_folder(store.root, 10)
    assert [path.name for path in list_set_aside(store.root)] == ["step-0000020.bad", "step-0000020.2.bad"]


def test_a_manifest_with_fields_of_a_later_release_is_read(store: CheckpointStore) -> None:
    path = save(store, 10) / "manifest.json"
    tree = json.loads(path.read_text())
    del tree[durable.SELF_HASH]
    path.write_text(durable.seal_json(tree | {"colour": "red"}, "content"))
    assert CheckpointManifest.load(path.parent).step == 10


# -- folders of other runs -------------------------------------------------------------------------------------------


@pytest.mark.fault("foreign-checkpoint")
def test_folders_of_others_neither_count_nor_go(tmp_path: Path) -> None:
    """Renamed, of another run, damaged, or simply newer: `keep` counts the run's own checkpoints up to this one."""
    steps: list[int] = []
    ours = CheckpointStore(tmp_path / "ours", keep=2, run_id="ours", on_commit=steps.append)
    theirs = CheckpointStore(tmp_path / "theirs", keep=2, run_id="theirs")
    for store, run_id in ((ours, "ours"), (theirs, "theirs")):
        store.prepare()
        store.save(replace(manifest(10), run_id=run_id), write_state)
    shutil.copytree(step_folder(theirs.root, 10), step_folder(ours.root, 8))
    shutil.copytree(step_folder(ours.root, 10), step_folder(ours.root, 9999999))
    for step in (20, 30, 40):
        ours.save(replace(manifest(step), run_id="ours"), write_state)
    names = [path.name for path in list_checkpoints(ours.root)]
    assert names == ["step-9999999", "step-0000040", "step-0000030", "step-0000008"]
    assert steps == [10, 20, 30, 40]


@pytest.mark.fault("foreign-checkpoint")
def test_a_folder_of_another_run_under_the_name_of_a_save_is_set_aside(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2, run_id="ours")
    store.prepare()
    foreign = store.save(replace(manifest(10), run_id="theirs"), write_state)
    assert find_problems(store.save(replace(manifest(10), run_id="ours"), write_state)) == []
    assert CheckpointManifest.load(foreign.with_name("step-0000010.bad")).run_id == "theirs"


@pytest.mark.fault("unreadable")
def test_a_folder_in_the_way_that_may_not_be_read_fails_the_save_and_stays(store: CheckpointStore) -> None:
    """On all ranks: one that raised alone would leave the others waiting."""
    path = save(store, 10) / "manifest.json"
    before = path.stat().st_ino
    with unreadable(path), pytest.raises(CheckpointError, match=r"step-0000010: not saved: rank 0: .*cannot be read"):
        save(store, 10)
    assert path.stat().st_ino == before
    assert [folder.name for folder in store.root.iterdir() if folder.is_dir()] == ["step-0000010"]
