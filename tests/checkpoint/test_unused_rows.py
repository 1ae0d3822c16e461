"""Rows of the word matrix that stand for no word are in no file; files of layouts with other parts are read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from state_ranges import write
from torch import nn

from pretrain.checkpoint.state_files import MOMENTS, WEIGHT, Range, StateReader, write_state
from pretrain.engine.zero_state import WholeState
from pretrain.model.layer_spec import with_words
from pretrain.model.parameter_shape import ParameterShape
from pretrain.parallel.mesh import Mesh

NAME, WORDS, SIZE = "tied_modules.word.weight", 100, 3
FULL = torch.arange(1.0, WORDS * SIZE + 1).view(WORDS, SIZE)


class Model(nn.Module):
    """The rows that one of `tp_size` ranks holds."""

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self.tied_modules = nn.ModuleDict({"word": nn.Embedding.from_pretrained(rows.clone(), freeze=False)})
        with_words(self.tied_modules["word"].weight, WORDS)  # type: ignore[arg-type]


def state_of(tp_rank: int, tp_size: int, full: torch.Tensor) -> WholeState:
    shape = ParameterShape((WORDS, SIZE), 0 if tp_size > 1 else None, num_rows=128 * tp_size)
    model = Model(shape.part_of(full, tp_rank, tp_size))
    engine = SimpleNamespace(module=model, basic_optimizer=torch.optim.AdamW(model.parameters()))
    return WholeState(engine, Mesh(dp_rank=0, dp_size=1, tp_rank=tp_rank, tp_size=tp_size), {NAME: shape})


def own_rows(state: WholeState) -> torch.Tensor:
    return next(state.engine.module.parameters()).detach()


@pytest.mark.parametrize("tp_size", [1, 2])
def test_files_hold_the_words_whatever_the_parts(tp_size: int, tmp_path: Path) -> None:
    for rank in range(tp_size):
        state = state_of(rank, tp_size, FULL)
        write_state(tmp_path, rank, state.ranges(), state.values, state.shapes)
    with StateReader(tmp_path) as reader:
        assert torch.equal(reader.read_full(NAME), FULL)
        for other_size in (1, 2, 4):
            for rank in range(other_size):
                state = state_of(rank, other_size, torch.zeros_like(FULL))
                state.read(reader, num_steps=1)
                expected = state.shapes[NAME].part_of(FULL, rank, other_size)
                assert torch.equal(own_rows(state), expected)


@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_files_of_releases_without_unused_rows_are_read(num_parts: int, tmp_path: Path) -> None:
    """They hold as many parts as there were tensor-parallel ranks, padded to a multiple of their number only."""
    older = ParameterShape((WORDS, SIZE), 0 if num_parts > 1 else None)
    parts = [older.part_of(FULL, part, num_parts).flatten() for part in range(num_parts)]
    for rank, part in enumerate(parts):
        ranges = [(Range(kind, NAME, rank, num_parts, 0, len(part)), part) for kind in (WEIGHT, *MOMENTS)]
        write(tmp_path, rank, ranges, {NAME: older})
    for rank in range(2):
        state = state_of(rank, 2, torch.zeros_like(FULL))
        with StateReader(tmp_path) as reader:
            state.read(reader, num_steps=3)
        assert torch.equal(own_rows(state), state.shapes[NAME].part_of(FULL, rank, 2))
        moments = state.optimizer.state[next(iter(state.engine.module.parameters()))]
        assert torch.equal(moments["exp_avg"], own_rows(state))
