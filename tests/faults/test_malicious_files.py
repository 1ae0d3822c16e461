"""Checkpoints from strangers: nothing in them is executed."""

from __future__ import annotations

import enum
import os
import pickle
from pathlib import Path

import pytest
import torch

from pretrain.engine import _SafeCheckpointFiles, load_safely, read_fp32_weights
from pretrain.errors import CheckpointError


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, writer: str) -> None:
    path, canary = tmp_path / "mp_rank_00_model_states.pt", tmp_path / "canary"
    if writer == "torch":
        torch.save({"module": Canary(canary)}, path)
    else:
        path.write_bytes(pickle.dumps({"module": Canary(canary)}))
    with pytest.raises(CheckpointError, match="refused"):
        load_safely(path)
    assert not canary.exists()


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_truncated_state_is_a_typed_error(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "x.pt"
    torch.save({"weight": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"x\.pt: refused"):
        load_safely(path)


def test_reading_weights_executes_nothing(tmp_path: Path) -> None:
    canary, state = tmp_path / "canary", tmp_path / "state"
    state.mkdir()
    torch.save({"module": Canary(canary)}, state / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": Canary(canary)}, state / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(CheckpointError, match="refused"):
        read_fp32_weights(tmp_path)
    assert not canary.exists()


def test_what_we_save_holds_no_enum_members(tmp_path: Path) -> None:
    """Some Pythons pickle them as a call of `getattr`, which the safe reader refuses."""

    class Stage(enum.IntEnum):
        ONE = 1

    files = _SafeCheckpointFiles()
    files.start(tmp_path)
    files.save(
        {"stage": Stage.ONE, "nested": [{"also": (Stage.ONE,)}], "weight": torch.ones(2)}, str(tmp_path / "x.pt")
    )
    (record,) = files.finish()
    loaded = load_safely(tmp_path / record.name)
    assert type(loaded["stage"]) is int
    assert type(loaded["nested"][0]["also"][0]) is int
    assert torch.equal(loaded["weight"], torch.ones(2))
