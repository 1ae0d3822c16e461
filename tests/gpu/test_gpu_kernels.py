"""The kernels in Triton on a GPU: what tests/kernels shows in Triton's interpreter, and what the interpreter cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contrast_cases import CASES, LIMITS, MICRO_BATCH, SEED, TEMPERATURE, Case, defined, deviation, drawn, tokens
from forked import run_ranks

from pretrain.objectives.taco import sample_pairs

LARGE = Case(16, 256, 1024, 50, valid=0.95, anchors=1.0)


def compare() -> dict[str, Any]:
    device = torch.device("cuda")
    return {
        f"{name}, {str(dtype)[6:]}": [
            deviation(*both) for both in zip(drawn(case, dtype, device), defined(case, dtype), strict=True)
        ]
        for name, case in {**CASES, "large": LARGE}.items()
        for dtype in LIMITS
    } | {
        "without padding, float32": [
            deviation(*both)
            for both in zip(
                drawn(LARGE, torch.float32, device, is_shuffled=True), defined(LARGE, torch.float32), strict=True
            )
        ]
    }


def compare_pairs() -> list[bool]:
    from pretrain.kernels.pairs import draw_pairs

    equal = []
    for case in (*CASES.values(), LARGE):
        valid_BL, segment_BL, _ = tokens(case)
        options: dict[str, Any] = {"window": case.window, "num_negatives": case.num_negatives}
        options |= {"seed": SEED, "micro_batch_index": MICRO_BATCH}
        found = draw_pairs(valid_BL.cuda(), segment_BL=segment_BL.cuda(), **options)
        expected = sample_pairs(valid_BL, segment_BL=segment_BL, **options)
        equal.append(all(torch.equal(one.cpu(), other) for one, other in zip(found, expected, strict=True)))
    return equal


def replayed() -> list[tuple[float, float]]:
    """Losses of a captured graph that is given another micro-batch, and those of launches."""
    from pretrain.kernels.contrast import drawn_contrastive_loss
    from pretrain.kernels.pairs import pair_key

    masks = [tensor.cuda() for tensor in tokens(LARGE)]
    hidden_TD, embedding_TD = (torch.randn(LARGE.num_rows * LARGE.length, LARGE.size, device="cuda") for _ in "he")
    key_2 = pair_key(SEED, 0, torch.device("cuda"))

    def loss(key_2: torch.Tensor) -> torch.Tensor:
        return drawn_contrastive_loss(
            hidden_TD, embedding_TD, *masks, key_2, window=2, num_negatives=50, temperature=TEMPERATURE
        )

    loss(key_2)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss(key_2)
    found = []
    for number in (0, 1, 2**40):
        key_2[1].fill_(number)
        graph.replay()
        found.append((float(captured), float(loss(pair_key(SEED, number, torch.device("cuda"))))))
    return found


def peak_memory() -> tuple[int, int]:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    drawn(LARGE, torch.bfloat16, torch.device("cuda"))
    return torch.cuda.max_memory_allocated() - before, 2 * LARGE.num_rows * LARGE.length * LARGE.size


def test_the_contrastive_loss_equals_its_definition() -> None:
    (found,) = run_ranks(1, compare)
    print(f"deviation of the contrastive loss in Triton and its gradients: {found}")
    for name, (loss, *gradients) in found.items():
        loss_limit, gradient_limit = LIMITS[getattr(torch, name.rpartition(", ")[2])]
        assert loss <= loss_limit, name
        assert max(gradients) <= gradient_limit, name


def test_pairs_are_those_of_the_definition() -> None:
    (equal,) = run_ranks(1, compare_pairs)
    assert all(equal)


def test_a_captured_graph_takes_another_micro_batch() -> None:
    (found,) = run_ranks(1, replayed)
    assert all(one == other for one, other in found)
    assert len({one for one, _ in found}) == 3


@pytest.mark.parametrize("num_tables", [9])
def test_memory_does_not_depend_on_the_number_of_negatives(num_tables: int) -> None:
    """h, e, their gradients and the table in 16 bits, and the gradient of g in 32: seven times a table of 16 bits."""
    ((peak, table),) = run_ranks(1, peak_memory)
    print(f"peak memory of the contrastive loss in Triton: {peak / table:.1f} times g")
    assert peak < num_tables * table
