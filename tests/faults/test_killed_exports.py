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
from pretrain.export import EXPORT_RECORD, export_checkpoint
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
    """Which checkpoint a folder is the export of, by the hash of its manifest; None where there is no folder."""
    return json.loads((out / EXPORT_RECORD).read_text())["manifest_sha256"] if out.exists() else None


@pytest.mark.parametrize("has_older", [False, True], ids=["new", "replacing"])
def test_killed_at_any_moment(
    checkpoints: tuple[Path, Path], tmp_path: Path, has_older: bool, fault: FaultRecorder
) -> None:
    older, newer = checkpoints
    export_checkpoint(newer, tmp_path / "whole")
    export_checkpoint(older, tmp_path / "older")
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    allowed = {exported_step(tmp_path / "whole"), exported_step(tmp_path / "older") if has_older else None}
    num_kills = 0
    # Few moments at the beginning, where a folder of another name is filled; each one at the end.
    for moment in itertools.chain(range(0, 12, 4), itertools.count(12)):
        place = tmp_path / f"at-{moment}"
        place.mkdir()
        out = place / "out"
        if has_older:
            shutil.copytree(tmp_path / "older", out)
        if not killed_at(moment, place, lambda out=out: export_checkpoint(newer, out, overwrite=True)):  # type: ignore[misc]
            break
        num_kills += 1
        assert not out.exists() or exported_step(out) in allowed
        assert export_checkpoint(newer, out, overwrite=True)["manifest_sha256"] == exported_step(tmp_path / "whole")
        assert {path.name for path in out.iterdir()} == names
        assert [path.name for path in place.iterdir()] == ["out"]
    assert num_kills > 4
    fault.record("export", injected=num_kills, survived=num_kills)


@pytest.mark.fault("export")
def test_what_was_moved_away_comes_back(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    """Killed between the two renames, the older export has another name; the next one looks for it first."""
    out = tmp_path / "out"
    export_checkpoint(checkpoints[0], out)
    out.rename(tmp_path / ".out.old")
    with pytest.raises(DataError, match="add --overwrite"):
        export_checkpoint(checkpoints[1], out)
    assert out.is_dir()


@pytest.mark.fault("export")
def test_a_full_disk(checkpoints: tuple[Path, Path], tmp_path: Path, disk: Callable[[str], Path]) -> None:
    folder = disk("size=40k")
    with pytest.raises(DataError, match=r"out: cannot be written: .*No space left on device"):
        export_checkpoint(checkpoints[0], folder / "out")
    assert list(folder.iterdir()) == []
    disk("size=4m")
    assert export_checkpoint(checkpoints[0], folder / "out")["is_new"]
