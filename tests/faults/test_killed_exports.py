"""An export that is killed at any moment, or whose disk is full: a whole folder is there, or none."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from crash_points import killed_at
from fault_records import FaultRecorder
from hf_folders import random_bert

from pretrain.checkpoint.manifest import find_checkpoint
from pretrain.errors import DataError
from pretrain.export import export_checkpoint
from pretrain.hf_writing.target import EXPORT_RECORD, Target
from pretrain.import_hf import import_folder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints to export."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for seed in (1, 2):
        import_folder(random_bert(folder / f"hf-{seed}", seed=seed), folder / str(seed))
    return find_checkpoint(folder / "1"), find_checkpoint(folder / "2")


def exported_step(out: Path) -> str | None:
    """Which checkpoint a folder is the export of, by the hash of its manifest; None where there is no record."""
    record = out / EXPORT_RECORD
    return json.loads(record.read_text())["manifest_sha256"] if record.exists() else None


@pytest.mark.parametrize("has_older", [False, True], ids=["new", "replacing"])
def test_killed_at_any_moment(
    checkpoints: tuple[Path, Path], tmp_path: Path, has_older: bool, fault: FaultRecorder
) -> None:
    older, newer = checkpoints
    export_checkpoint(newer, tmp_path / "whole")
    export_checkpoint(older, tmp_path / "older")
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    allowed = {exported_step(tmp_path / "whole"), exported_step(tmp_path / "older") if has_older else None, None}
    num_kills = 0
    # Few moments at the beginning, where a folder of another name is filled; each one at the end.
    for moment in itertools.chain(range(0, 12, 4), itertools.count(12)):
        place = tmp_path / f"at-{moment}"
        place.mkdir()
        out = place / "out"
        if has_older:
            shutil.copytree(tmp_path / "older", out)
            (out / "notes.txt").write_text("mine")
        if not killed_at(moment, place, lambda out=out: export_checkpoint(newer, out, overwrite=True)):  # type: ignore[misc]
            break
        num_kills += 1
        assert exported_step(out) in allowed
        if (out / "config.json").exists():  # otherwise nobody loads it
            assert {path.name for path in out.iterdir()} >= names - {EXPORT_RECORD}
        assert export_checkpoint(newer, out, overwrite=True)["manifest_sha256"] == exported_step(tmp_path / "whole")
        assert {path.name for path in out.iterdir()} == names | ({"notes.txt"} if has_older else set())
        assert [path.name for path in place.iterdir()] == ["out"]
    assert num_kills > 4
    fault.record("export", injected=num_kills, survived=num_kills)


@pytest.mark.fault("export")
@pytest.mark.parametrize("at", ["README.md", "model.safetensors", "config.json", EXPORT_RECORD])
def test_what_was_moved_away_comes_back(
    checkpoints: tuple[Path, Path], tmp_path: Path, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the new files are moved in, also twice: the next export first takes back the older one."""
    out, rename = tmp_path / "out", Path.rename
    export_checkpoint(checkpoints[0], out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def killed(self: Path, target: Path) -> Path:
        if self.parent.name == "new" and self.name == at:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    monkeypatch.setattr(Target, "discard", lambda self: None)  # as a kill leaves it
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(checkpoints[1], out, overwrite=True)
    monkeypatch.undo()
    assert (out / ".taco-export" / "old" / "model.safetensors").exists()
    with pytest.raises(DataError, match="add --overwrite"):
        export_checkpoint(checkpoints[1], out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.fault("export")
def test_a_full_disk(checkpoints: tuple[Path, Path], tmp_path: Path, disk: Callable[[str], Path]) -> None:
    folder = disk("size=40k")
    with pytest.raises(DataError, match=r"out: cannot be written: .*No space left on device"):
        export_checkpoint(checkpoints[0], folder / "out")
    assert list(folder.iterdir()) == []
    disk("size=4m")
    assert export_checkpoint(checkpoints[0], folder / "out")["is_new"]
