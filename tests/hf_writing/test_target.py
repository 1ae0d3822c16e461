"""Where an export may go, what it replaces there, and what it leaves alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hf_folders import random_bert

from pretrain.checkpoint.manifest import find_checkpoint
from pretrain.errors import DataError
from pretrain.export import export_checkpoint
from pretrain.hf_writing.target import CARD_BESIDE, EXPORT_RECORD
from pretrain.import_hf import import_folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints to export."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for seed in (1, 2):
        import_folder(random_bert(folder / f"hf-{seed}", seed=seed), folder / str(seed))
    return find_checkpoint(folder / "1"), find_checkpoint(folder / "2")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_folders_that_are_empty_are_filled(
    checkpoints: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here", "empty", "behind"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("behind")
    monkeypatch.chdir(tmp_path / "here")
    for out in (Path(), Path("../empty"), tmp_path / "link"):
        assert export_checkpoint(checkpoints[0], out)["is_new"]
        assert not export_checkpoint(checkpoints[0], out)["is_new"]
        assert names(out) == {"README.md", "config.json", "model.safetensors", EXPORT_RECORD}
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path) == {"here", "empty", "behind", "link"}


def test_what_is_no_place_for_an_export_is_refused_and_kept(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint = checkpoints[0]
    (tmp_path / "file").write_text("x")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "main.tex").write_text("x")
    before = names(checkpoint)
    for out, words in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "thesis", "is no export: it holds main.tex"),
        (checkpoint, "lies in a checkpoint"),
        (checkpoint / "export", "lies in a checkpoint"),
        (checkpoint.with_name("step-0000050"), "would look like a checkpoint"),
        (tmp_path / "file" / "out", "cannot be written"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            export_checkpoint(checkpoint, out, overwrite=True)
        assert str(caught.value).startswith(f"{out}: ")
        assert "\n" not in str(caught.value)
    assert names(tmp_path) == {"file", "thesis"}
    assert names(checkpoint) == before


def test_a_link_to_what_is_not_mounted_is_not_made_there(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "export")
    with pytest.raises(DataError, match=r"link: is a link to .*disk/export, which is not there; mount or make that"):
        export_checkpoint(find_checkpoint(checkpoints[0]), tmp_path / "link")
    assert not (tmp_path / "disk").exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.fault("export")
@pytest.mark.parametrize(
    ("name", "harm", "words"),
    [
        ("model.safetensors", cut, "model.safetensors expected [0-9]+ bytes"),
        ("config.json", Path.unlink, "config.json is missing"),
        (EXPORT_RECORD, cut, "taco_export.json is damaged"),
    ],
)
def test_a_damaged_export_is_not_there_already(
    name: str, harm: Callable[[Path], None], words: str, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export_checkpoint(checkpoints[0], out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    harm(out / name)
    with pytest.raises(DataError, match=f"{words}.*add --overwrite"):
        export_checkpoint(checkpoints[0], out)
    assert export_checkpoint(checkpoints[0], out, overwrite=True)["is_new"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_overwriting_removes_only_what_the_earlier_export_wrote(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_checkpoint(checkpoints[0], out)
    record = json.loads((out / EXPORT_RECORD).read_text())
    (out / "obsolete.txt").write_text("of the earlier export")
    record["files"].append({"name": "obsolete.txt", "num_bytes": 21, "xxh3_128": "0"})
    (out / EXPORT_RECORD).write_text(json.dumps(record))
    (out / "results").mkdir()
    (out / "results" / "glue.json").write_text("{}")
    (out / "vocab.txt").write_text("mine")
    with (out / "README.md").open("a") as card:
        card.write("My notes.\n")
    edited = (out / "README.md").read_text()
    result = export_checkpoint(checkpoints[1], out, overwrite=True)
    assert result["is_new"]
    assert any("README.md was edited and is kept" in warning for warning in result["warnings"])
    assert (out / "README.md").read_text() == edited
    assert (out / "vocab.txt").read_text() == "mine"
    assert result["manifest_sha256"] in (out / CARD_BESIDE).read_text()
    assert names(out) == {
        "README.md", CARD_BESIDE, "config.json", "model.safetensors", EXPORT_RECORD, "results", "vocab.txt",
    }  # fmt: skip
    assert not export_checkpoint(checkpoints[1], out)["is_new"]


def test_a_file_of_the_user_under_the_name_of_a_new_one_is_not_replaced(
    checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export_checkpoint(checkpoints[0], out)
    record = json.loads((out / EXPORT_RECORD).read_text())
    record["files"] = [file for file in record["files"] if file["name"] != "config.json"]
    (out / EXPORT_RECORD).write_text(json.dumps(record))
    with pytest.raises(DataError, match="config.json is in the way"):
        export_checkpoint(checkpoints[1], out, overwrite=True)
    assert json.loads((out / EXPORT_RECORD).read_text()) == record


@pytest.mark.parametrize("umask", [0o002, 0o027])
def test_modes_follow_the_umask(umask: int, checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        export_checkpoint(checkpoints[0], tmp_path / "out")
        import_folder(tmp_path / "out", tmp_path / "again")
    finally:
        os.umask(before)
    for folder in (tmp_path / "out", tmp_path / "again"):
        for path in (folder, *folder.rglob("*")):
            usual = 0o777 if path.is_dir() else 0o666
            assert path.stat().st_mode & 0o777 == usual & ~umask, path
