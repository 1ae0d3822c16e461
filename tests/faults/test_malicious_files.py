"""Checkpoints from strangers: nothing in them is executed."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from pretrain.engine import load_safely, read_fp32_weights
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


def test_reading_weights_executes_nothing(tmp_path: Path) -> None:
    canary, state = tmp_path / "canary", tmp_path / "state"
    state.mkdir()
    torch.save({"module": Canary(canary)}, state / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": Canary(canary)}, state / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(CheckpointError, match="refused"):
        read_fp32_weights(tmp_path)
    assert not canary.exists()
