"""Pairs drawn by Triton: the integers of `sample_pairs`, on every kind of micro-batch."""

from __future__ import annotations

import pytest
import torch
from contrast_cases import CASES, Case, tokens
from torch import Tensor

from pretrain.errors import ConfigError
from pretrain.kernels.pairs import PairTable, draw_pairs, pair_key, tabulate_pairs
from pretrain.objectives.taco import sample_pairs


def _assert_equal_pairs(valid_BL: Tensor, segment_BL: Tensor | None, device: torch.device, **options: int) -> None:
    on_device = None if segment_BL is None else segment_BL.to(device)
    found = draw_pairs(valid_BL.to(device), segment_BL=on_device, **options)
    expected = sample_pairs(valid_BL, segment_BL=segment_BL, **options)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equal_those_of_the_definition(case: Case, device: torch.device) -> None:
    valid_BL, segment_BL, _ = tokens(case)
    options = {"window": case.window, "num_negatives": case.num_negatives}
    _assert_equal_pairs(valid_BL, segment_BL, device, seed=2**63 + 5, micro_batch_index=2**40 + 3, **options)


def test_equal_on_random_micro_batches(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for number in range(12):
        shape = (
            (draw(2, 7), draw(1, 12)) if number % 6 else (2, draw(65, 140))
        )  # longer than a program's share of a row
        valid_BL = torch.rand(shape, generator=generator) <= (1.0, 0.7, 0.2)[number % 3]
        documents = torch.randint(
            0, draw(1, 5), shape, generator=generator, dtype=(torch.int64, torch.int32)[number % 2]
        )
        documents = documents.cumsum(1).to(documents.dtype) if number % 4 < 2 else documents  # in order, or mixed up
        options = {"window": draw(1, 9), "num_negatives": draw(1, 12), "seed": draw(0, 2**62) * 4 + 3}
        segment_BL = documents if number % 5 else None
        _assert_equal_pairs(valid_BL, segment_BL, device, micro_batch_index=draw(0, 2**62), **options)


def test_a_window_wider_than_the_row_and_one_row_with_tokens(device: torch.device) -> None:
    valid_BL = torch.ones(3, 5, dtype=torch.bool)
    _assert_equal_pairs(valid_BL, None, device, window=2**30 - 1, num_negatives=2, seed=1, micro_batch_index=0)
    valid_BL[1:] = False
    _assert_equal_pairs(valid_BL, None, device, window=1, num_negatives=2, seed=0, micro_batch_index=2**64 - 1)


def test_tensors_that_are_no_blocks_of_memory(device: torch.device) -> None:
    valid_BL, segment_BL, _ = tokens(Case(12, 7, 1, 1))
    options = {"window": 2, "num_negatives": 3, "seed": 4, "micro_batch_index": 5}
    _assert_equal_pairs(valid_BL.t(), segment_BL.t(), device, **options)


def test_the_key_is_read_from_the_device(device: torch.device) -> None:
    """So a captured CUDA graph draws the pairs of whatever micro-batch the key names when it is replayed."""
    valid_BL, segment_BL, _ = tokens(CASES["hidden size no power of two"])
    key_2 = pair_key(7, 3, device)

    def positives() -> PairTable:
        return tabulate_pairs(valid_BL.to(device), segment_BL.to(device), key_2, window=2)

    first = positives().positive_G
    key_2[1].fill_(2**40 + 3)
    length = valid_BL.shape[1]
    expected_BL, _ = sample_pairs(
        valid_BL, window=2, num_negatives=1, seed=7, micro_batch_index=2**40 + 3, segment_BL=segment_BL
    )
    found_BL = positives().positive_G.cpu().view(-1, length)
    assert torch.equal(torch.where(found_BL < 0, -1, found_BL % length).long(), expected_BL)
    assert not torch.equal(first.cpu().view(-1, length), found_BL)


def test_wrong_arguments_are_named_as_by_the_definition(device: torch.device) -> None:
    options = {"window": 2, "num_negatives": 5, "seed": 0, "micro_batch_index": 0}
    with pytest.raises(ConfigError, match="micro_batch_size"):
        draw_pairs(torch.ones(1, 4, dtype=torch.bool, device=device), **options)
    with pytest.raises(ValueError, match="window"):
        draw_pairs(torch.ones(2, 4, dtype=torch.bool, device=device), **{**options, "window": 0})
