"""Rows without waste: every token gets what its document would get alone, whatever stands beside it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pretrain.config.sections import ModelSection, ObjectiveSection
from pretrain.kernels.attention_choice import ATTENTION_BLOCK
from pretrain.model.bert import Bert
from pretrain.model.layer_spec import plain_layers
from pretrain.model.pretraining import BertForPretraining
from pretrain.model.token_rows import plan_rows
from pretrain.objectives.mlm import masked_lm_loss
from pretrain.objectives.taco import sample_pairs, token_contrastive_loss

LENGTH = 12
CONFIG = ModelSection(
    num_layers=2, hidden_size=16, num_attention_heads=2, ffn_hidden_size=32, hidden_dropout=0.0, attention_dropout=0.0
)
WORDS = 40
TOLERANCE = {"rtol": 0.0, "atol": 1e-10}
# The documents of each row by length; what is left of a row is padding.
MICRO_BATCHES: dict[str, list[list[int]]] = {
    "usual": [[12], [9], [4]],
    "one token": [[1], [12], [5]],
    "padding alone in a row": [[7], [], [3]],
    "all but one row padding": [[], [], [11]],
    "full": [[12], [12], [12]],
    "packed": [[3, 4, 5], [12], [2, 2, 1]],
    "packed, short": [[1] * 12, [1], [2] * 6],
}


def _segments(documents: list[list[int]], length: int = LENGTH) -> np.ndarray:
    segment_BL = np.zeros((len(documents), length), np.int64)
    for row, lengths in enumerate(documents):
        numbers = np.repeat(np.arange(len(lengths)) + 1, lengths)
        segment_BL[row, : len(numbers)] = numbers
    return segment_BL


def _documents(segment_BL: np.ndarray) -> Iterator[tuple[int, slice]]:
    for row, segment_L in enumerate(segment_BL):
        for number in range(1, int(segment_L.max()) + 1):
            columns = np.flatnonzero(segment_L == number)
            yield row, slice(int(columns[0]), int(columns[-1]) + 1)


def _model(separate_documents: bool) -> BertForPretraining:
    """In fp64, where rounding cannot hide or feign a mistake."""
    objective = ObjectiveSection(num_negatives=4)
    model = BertForPretraining(CONFIG, WORDS, plain_layers(), objective, seed=1, separate_documents=separate_documents)
    return model.double()


def _each_alone(model: Bert, ids_BL: Tensor, segment_BL: np.ndarray) -> tuple[Tensor, Tensor]:
    """h and e [B, L, D] from one document at a time, in rows without padding; 0 at padding."""
    plain = Bert(CONFIG, WORDS, plain_layers(), has_padding=False)
    for name, parameter in model.named_parameters():  # gradients of both arrive at one place
        owner, _, last = name.rpartition(".")
        setattr(plain.get_submodule(owner), last, parameter)
    grids = [torch.zeros(*ids_BL.shape, CONFIG.hidden_size, dtype=torch.float64) for _ in "he"]
    for row, columns in _documents(segment_BL):
        own_BL = ids_BL[row : row + 1, columns]
        for grid, found_LD in zip(grids, plain.encode(own_BL, torch.ones_like(own_BL)), strict=True):
            grid[row, columns] = found_LD
    return grids[0], grids[1]


@pytest.mark.fault("degenerate-batch")
@pytest.mark.parametrize("name", MICRO_BATCHES)
def test_losses_and_gradients_are_those_of_documents_alone(name: str) -> None:
    segment_BL = _segments(MICRO_BATCHES[name])
    segment = torch.from_numpy(segment_BL)
    model = _model(separate_documents=name.startswith("packed"))
    ids_BL = torch.randint(0, WORDS, segment.shape, generator=torch.Generator().manual_seed(0))
    place_M = torch.from_numpy(np.append(np.flatnonzero(segment_BL)[::2], [0, 0]))
    label_M = torch.randint(0, WORDS, place_M.shape, generator=torch.Generator().manual_seed(1))
    label_M[-2:] = -100
    losses = model(ids_BL, segment, segment > 0, place_M, label_M, 3)
    hidden_BLD, embedding_BLD = _each_alone(model, ids_BL, segment_BL)
    mlm, num_correct, _ = masked_lm_loss(model.predict(hidden_BLD.flatten(0, 1), place_M), label_M)
    pairs = sample_pairs(segment > 0, window=2, num_negatives=4, seed=1, micro_batch_index=3, segment_BL=segment)
    contrastive = token_contrastive_loss(hidden_BLD, embedding_BLD, *pairs, temperature=0.07)
    assert_close((losses.mlm, losses.contrastive), (mlm, contrastive.detach()), **TOLERANCE)
    assert losses.num_correct == num_correct
    parameters = dict(model.named_parameters())
    found, expected = (
        torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        for total in (losses.total, mlm + contrastive)
    )
    for gradient, wanted in zip(found, expected, strict=True):
        wanted = torch.zeros_like(gradient) if wanted is None else wanted
        assert_close(gradient, wanted, **TOLERANCE)
    is_token = segment > 0
    for grid, expected_BLD in zip(model.encode(ids_BL, segment), (hidden_BLD, embedding_BLD), strict=True):
        assert_close(grid.view(*ids_BL.shape, -1), expected_BLD, **TOLERANCE)
    logits_BLV = model.logits(ids_BL, segment)
    assert not logits_BLV[~is_token].any()
    assert_close(
        logits_BLV[is_token], model.predict(hidden_BLD[is_token], torch.arange(int(is_token.sum()))), **TOLERANCE
    )


def test_a_hundred_documents_in_one_row() -> None:
    lengths = [1 + number % 3 for number in range(100)]
    segment_BL = _segments([lengths, [200]], length=220)
    model = _model(separate_documents=True)
    ids_BL = torch.randint(0, WORDS, segment_BL.shape)
    found = model.encode(ids_BL, torch.from_numpy(segment_BL))
    for grid, expected_BLD in zip(found, _each_alone(model, ids_BL, segment_BL), strict=True):
        assert_close(grid.view_as(expected_BLD), expected_BLD, **TOLERANCE)


@pytest.mark.parametrize("separate_documents", [False, True])
@pytest.mark.parametrize("multiple", [1, 2, 3, 6, 12, 36])
@pytest.mark.parametrize("name", [*MICRO_BATCHES, "nothing"])
def test_the_plan_holds_every_token_once_and_padding_only_where_it_must(
    name: str, multiple: int, separate_documents: bool
) -> None:
    segment_BL = _segments(MICRO_BATCHES.get(name, [[], [], []]))
    rows = plan_rows(segment_BL, separate_documents=separate_documents, multiple=multiple)
    assert rows.place_T is not None
    assert rows.bound_N1 is not None
    assert rows.block_K3 is not None
    place_T, num_real = rows.place_T.numpy(), np.count_nonzero(segment_BL)
    assert place_T[:num_real].tolist() == np.flatnonzero(segment_BL).tolist()
    assert len(set(place_T.tolist())) == len(place_T)
    assert len(place_T) % multiple == 0
    assert len(place_T) - num_real < multiple or num_real == 0
    assert rows.find(rows.place_T).tolist() == list(range(len(place_T)))
    # The blocks cover every document, and nothing twice.
    covered = [
        (first, end, number)
        for start, first, end in rows.block_K3.tolist()
        for number in range(start, min(start + ATTENTION_BLOCK, end))
    ]
    bounds = rows.bound_N1.tolist()
    documents = [
        (first, end, number) for first, end in zip(bounds, bounds[1:], strict=False) for number in range(first, end)
    ]
    assert sorted(covered) == documents
    assert bounds[-1] == len(place_T)


def test_a_piece_of_a_document_after_padding_is_another_document_of_a_packed_row() -> None:
    segment_BL = np.array([[0, 1, 1, 0, 1, 2]])
    packed = plan_rows(segment_BL, separate_documents=True)
    whole = plan_rows(segment_BL, separate_documents=False)
    for rows, bounds, positions in ((packed, [0, 2, 3, 4], [0, 1, 0, 0]), (whole, [0, 4], [1, 2, 4, 5])):
        assert rows.bound_N1 is not None
        assert rows.position_T is not None
        assert rows.bound_N1.tolist() == bounds
        assert rows.position_T.tolist() == positions


def test_blocks_of_a_long_document() -> None:
    rows = plan_rows(_segments([[5, 200], [64]], 205), separate_documents=True)
    assert rows.block_K3 is not None
    starts = [[first + step, first, first + 200] for first in (5,) for step in (0, 64, 128, 192)]
    assert rows.block_K3.tolist() == [*starts, [205, 205, 269], [0, 0, 5]]
