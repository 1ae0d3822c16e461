"""Who may change what a run has written."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from live_ranks import live_ranks
from small_runs import write_small_run

pytestmark = pytest.mark.slow


def modes_of(folder: Path) -> dict[str, int]:
    """Permissions of a folder and of everything in it, by path."""
    paths = [folder, *folder.rglob("*")]
    return {
        str(path.relative_to(folder)): stat.S_IMODE(path.lstat().st_mode) for path in paths if not path.is_symlink()
    }


@pytest.mark.parametrize(("umask", "never", "folder_mode"), [(0o000, 0o002, 0o775), (0o077, 0o077, 0o700)], ids=oct)
def test_a_run_can_be_changed_by_nobody_that_the_umask_keeps_out_and_never_by_everybody(
    umask: int, never: int, folder_mode: int, tmp_path: Path
) -> None:
    config = write_small_run(tmp_path, train__steps=2, optim__warmup_steps=1)
    for path in (tmp_path / "train.tokenizer").iterdir():
        path.chmod(0o666)
    with live_ranks(1, config, "run.tensorboard=true", before=lambda _: os.umask(umask) and None) as ranks:
        assert ranks.wait() == [0], ranks.output()
    modes = modes_of(ranks.run)
    assert {"run.lock", "metrics.jsonl", "logs/rank_00000.log", "tokenizer/vocab.txt"} <= modes.keys()
    assert "checkpoints/step-0000002/manifest.json" in modes
    assert any(name.startswith("tensorboard/") for name in modes)
    assert {name: oct(mode) for name, mode in modes.items() if mode & never} == {}
    assert modes["."] == modes["checkpoints"] == folder_mode
    assert "everybody may write here" not in ranks.output()


def test_a_folder_that_everybody_may_write_to_is_told(tmp_path: Path) -> None:
    config = write_small_run(tmp_path, train__steps=2, optim__warmup_steps=1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o777)
    with live_ranks(1, config) as ranks:
        assert ranks.wait() == [0], ranks.output()
    assert f"{tmp_path / 'run'}: everybody may write here" in ranks.output()
