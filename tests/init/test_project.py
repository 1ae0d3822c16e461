"""A new project holds what this installation has, and nothing that is there before it is touched."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from project import ROOT

from pretrain.config.load import load_config
from pretrain.errors import ConfigError, TacoError
from pretrain.init import project
from pretrain.init.project import lay_out, project_files


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of the last change of every file."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def test_configurations_and_job_scripts_are_those_of_the_repository(tmp_path: Path) -> None:
    written = lay_out(tmp_path / "new" / "thesis")
    originals = [*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "slurm").glob("*.sh")]
    names = {path.relative_to(ROOT).as_posix() for path in originals}
    assert set(written) == names | {"README.md", ".gitignore"} == set(state(tmp_path / "new" / "thesis"))
    for name in names:
        copy = tmp_path / "new" / "thesis" / name
        assert copy.read_bytes() == (ROOT / name).read_bytes()
        assert os.access(copy, os.X_OK) == os.access(ROOT / name, os.X_OK)


def test_every_job_script_finds_its_configuration(tmp_path: Path) -> None:
    lay_out(tmp_path)
    named = [re.findall(r"^config=(.*)", path.read_text(), re.MULTILINE) for path in tmp_path.glob("slurm/*_*.sh")]
    assert len(named) > 3
    for (name,) in named:
        load_config(tmp_path / name)


def test_what_the_readme_names_is_there(tmp_path: Path) -> None:
    files = project_files()
    text = files["README.md"].decode()
    named = set(re.findall(r"\b(?:configs|slurm)/[\w/]+\.\w+", text))
    assert named
    assert named <= set(files)


def test_laying_out_twice_changes_nothing_and_restores_what_is_missing(tmp_path: Path) -> None:
    lay_out(tmp_path)
    before = state(tmp_path)
    assert lay_out(tmp_path) == []
    (tmp_path / "slurm" / "task.sh").unlink()
    (tmp_path / "notes.txt").write_text("mine")
    assert lay_out(tmp_path) == ["slurm/task.sh"]
    after = state(tmp_path)
    assert after.pop("notes.txt")[0] == b"mine"
    restored = after.pop("slurm/task.sh")
    assert restored[0] == before.pop("slurm/task.sh")[0]
    assert after == before


@pytest.mark.parametrize("kind", ["file", "folder", "broken link", "file for a folder", "the project itself"])
def test_what_is_in_the_way_is_named_before_anything_is_written(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "thesis"
    obstacle = {"file for a folder": folder / "configs", "the project itself": folder}.get(kind, folder / "README.md")
    obstacle.parent.mkdir(exist_ok=True)
    if kind == "folder":
        obstacle.mkdir()
    elif kind == "broken link":
        obstacle.symlink_to("nowhere")
    else:
        obstacle.write_text("mine")
    before = state(tmp_path)
    with pytest.raises(ConfigError) as refused:
        lay_out(folder)
    assert str(refused.value).startswith(f"{obstacle}: already there")
    assert "nothing was written" in str(refused.value)
    assert state(tmp_path) == before
    obstacle.rename(tmp_path / "moved away")  # what the message advises
    assert lay_out(folder)


def test_many_obstacles_are_counted(tmp_path: Path) -> None:
    lay_out(tmp_path)
    for path in (tmp_path / "configs").glob("*.yaml"):
        path.write_text("# changed\n")
    with pytest.raises(ConfigError, match=r"mlm_base\.yaml, .* and 3 more: already there"):
        lay_out(tmp_path)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TacoError, match=r"/proc/thesis: cannot hold a project"):
        lay_out(Path("/proc/thesis"))


def test_a_file_that_could_not_be_finished_is_not_left_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_full(descriptor: int, mode: str) -> None:
        os.close(descriptor)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(project, "open", is_full, raising=False)
    with pytest.raises(TacoError, match="No space left on device"):
        lay_out(tmp_path)
    monkeypatch.undo()
    assert state(tmp_path) == {}
    assert lay_out(tmp_path)


def test_an_installation_without_its_files_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "project_readme.md").write_text("x")
    monkeypatch.setattr(project, "_HERE", tmp_path)
    with pytest.raises(TacoError, match="install taco-pretrain again"):
        project_files()
