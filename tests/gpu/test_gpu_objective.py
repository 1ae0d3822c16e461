"""The contrastive loss on a GPU: the same pairs as on a CPU, the same loss and gradients, and no gathered tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forked import run_ranks

from pretrain.objectives.taco import sample_pairs, token_contrastive_loss

B, L, K, D = 8, 128, 50, 256


def pairs_on(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    valid_BL = torch.ones(B, L, dtype=torch.bool)
    valid_BL[2, 60:] = False
    segment_BL = torch.arange(L).expand(B, L) // 40
    found = sample_pairs(
        valid_BL.to(device),
        window=2,
        num_negatives=K,
        seed=7,
        micro_batch_index=2**40,
        segment_BL=segment_BL.to(device),
    )
    return found[0].cpu(), found[1].cpu()


def loss_on(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    hidden, embedding = (torch.randn(B, L, D).to(device, dtype).requires_grad_() for _ in range(2))
    pairs = [part.to(device) for part in pairs_on("cpu")]
    loss = token_contrastive_loss(hidden, embedding, *pairs, temperature=0.07)
    return [value.detach().cpu().double() for value in (loss, *torch.autograd.grad(loss, (hidden, embedding)))]


def compare() -> dict[str, Any]:
    return {
        "pairs": [torch.equal(*both) for both in zip(pairs_on("cuda"), pairs_on("cpu"), strict=True)],
        **{
            str(dtype): [
                float((a - b).norm() / b.norm())
                for a, b in zip(loss_on("cuda", dtype), loss_on("cpu", dtype), strict=True)
            ]
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        },
    }


def peak_memory() -> tuple[int, int]:
    hidden, embedding = (torch.randn(B, L, D, device="cuda", requires_grad=True) for _ in range(2))
    pairs = [part.cuda() for part in pairs_on("cpu")]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    token_contrastive_loss(hidden, embedding, *pairs, temperature=0.07).backward()
    return torch.cuda.max_memory_allocated() - before, hidden.numel() * hidden.element_size()


def test_equals_the_cpu() -> None:
    (found,) = run_ranks(1, compare)
    print(f"deviation of the contrastive loss and its gradients: {found}")
    assert all(found["pairs"])
    for dtype, limit in (("float64", 1e-12), ("float32", 1e-5), ("bfloat16", 1e-2), ("float16", 2e-3)):
        assert max(found[f"torch.{dtype}"]) < limit, dtype


@pytest.mark.parametrize("num_tables", [12])
def test_no_gathered_tensor_exists(num_tables: int) -> None:
    """Candidates of all anchors would take 1 + K times the memory of g."""
    ((peak, table),) = run_ranks(1, peak_memory)
    print(f"peak memory of the contrastive loss: {peak / table:.1f} times g")
    assert peak < num_tables * table
