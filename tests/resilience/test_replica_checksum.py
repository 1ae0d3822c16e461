"""The checksum of a copy: no flipped bit and no exchanged element stays unseen; and how a drift is told."""

from __future__ import annotations

import itertools

import pytest
import torch

from pretrain.resilience.replicas import Drift, checksum

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def flipped(tensor: torch.Tensor, index: int, bit: int) -> torch.Tensor:
    """A copy with one bit changed."""
    copy = tensor.clone()
    bits = copy.view(BITS[tensor.dtype]).flatten()
    bits[index] ^= torch.tensor(1).bitwise_left_shift(bit).to(bits.dtype)
    return copy


@pytest.mark.parametrize("dtype", BITS)
def test_every_bit_counts(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    places = itertools.product(range(tensor.numel()), range(8 * dtype.itemsize))
    found = {int(checksum(flipped(tensor, index, bit))) for index, bit in places}
    assert len(found) == tensor.numel() * 8 * dtype.itemsize
    assert int(checksum(tensor)) not in found
    assert int(checksum(tensor.clone())) == int(checksum(tensor))


def test_two_flips_of_one_bit_do_not_cancel() -> None:
    tensor = torch.zeros(40)
    pairs = list(itertools.combinations(range(40), 2))
    found = {int(checksum(flipped(flipped(tensor, i, 31), j, 31))) for i, j in pairs}
    assert len(found) == len(pairs)
    assert int(checksum(tensor)) not in found


def test_order_and_signs_of_zero_and_nan_count() -> None:
    tensor = torch.arange(6.0)
    assert int(checksum(tensor.flip(0))) != int(checksum(tensor))
    assert int(checksum(torch.tensor([-0.0]))) != int(checksum(torch.tensor([0.0])))
    assert int(checksum(torch.tensor([torch.nan]))) == int(checksum(torch.tensor([torch.nan])))


def test_large_tensors_count_to_their_ends() -> None:
    tensor = torch.zeros((1 << 21) + 3)
    found = [int(checksum(flipped(tensor, index, 0))) for index in (0, (1 << 20) - 1, 1 << 20, 1 << 21, (1 << 21) + 2)]
    assert len({int(checksum(tensor)), *found}) == 6


def test_it_is_the_sum_that_it_says() -> None:
    """Against Python's whole numbers, on a length that crosses no chunk and one that crosses two."""
    from pretrain.resilience import replicas

    factors = replicas._place_factors(torch.device("cpu")).tolist()
    generator = torch.Generator().manual_seed(1)
    for length in (7, (1 << 20) + 2):
        bits = torch.randint(-(2**31), 2**31, (length,), generator=generator, dtype=torch.int32)
        total = 0
        for first in range(0, length, 1 << 20):
            chunk = bits[first : first + (1 << 20)].tolist()
            total = total * replicas._FACTOR + sum(x * y for x, y in zip(chunk, factors, strict=False))
        assert int(checksum(bits.view(torch.float32))) % 2**64 == total % 2**64


def test_a_layout_of_memory_changes_nothing() -> None:
    matrix = torch.randn(4, 6)
    assert int(checksum(matrix.t().contiguous().t())) == int(checksum(matrix))
    assert int(checksum(torch.empty(0))) == 0


def test_the_majority_is_right_and_a_tie_names_both() -> None:
    assert str(Drift("2.norm.weight", ((0, 1, 2, 5), (3,)))) == "2.norm.weight on rank 3 differs from ranks 0-2, 5"
    assert str(Drift("w", ((0, 3), (1,), (2,)))) == "w on ranks 1-2 differs from ranks 0, 3"
    tie = Drift("w", ((0, 1), (2, 3)))
    assert tie.wrong_ranks == ()
    assert str(tie) == "w differs between ranks 0-1 and ranks 2-3"
