"""Micro-batches on which the kernels of the contrastive loss are held against its definition, on a CPU or a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.objectives.taco import sample_pairs, token_contrastive_loss

SEED, MICRO_BATCH = 2**63 + 5, 2**40 + 3
TEMPERATURE = 0.07


@dataclass(frozen=True)
class Case:
    """Shapes, and how many tokens are valid and may be anchors."""

    num_rows: int
    length: int
    size: int
    num_negatives: int
    window: int = 2
    valid: float = 0.8
    anchors: float = 0.7
    num_documents: int = 2


CASES = {
    "one negative": Case(3, 13, 48, 1),
    "four negatives": Case(2, 16, 64, 4, valid=1.0, anchors=1.0, num_documents=1),
    "hidden size no power of two": Case(4, 16, 768, 50),
    "hidden size of three": Case(2, 9, 3, 5),
    "more than a warp's features": Case(2, 8, 1100, 6),
    "negatives no multiple of four": Case(3, 11, 32, 203),
    "rows of one token": Case(5, 1, 16, 3),
    "few anchors": Case(3, 40, 24, 9, anchors=0.05),
    "few valid tokens": Case(6, 7, 24, 9, valid=0.15, anchors=1.0),
    "alone in every document": Case(3, 6, 8, 2, num_documents=50),
    "no anchor": Case(3, 9, 16, 5, anchors=-1.0),
    "no valid token": Case(3, 9, 16, 5, valid=-1.0),
}


def tokens(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Valid tokens, documents and anchors, each [B, L]."""
    generator = torch.Generator().manual_seed(3)
    valid_BL = torch.rand(case.num_rows, case.length, generator=generator) <= case.valid
    segment_BL = torch.randint(0, case.num_documents, valid_BL.shape, generator=generator)
    return valid_BL, segment_BL, valid_BL & (torch.rand(valid_BL.shape, generator=generator) <= case.anchors)


def vectors(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """h and e, [T, D]; some tokens have no global semantics at all."""
    generator = torch.Generator().manual_seed(4)
    shape = case.num_rows * case.length, case.size
    hidden_TD, embedding_TD = (torch.randn(shape, generator=generator).to(dtype) for _ in "he")
    hidden_TD[:: max(5, len(hidden_TD) // 4)] = embedding_TD[:: max(5, len(hidden_TD) // 4)]
    return hidden_TD, embedding_TD


def defined(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Loss and gradients of h and e by the definition in fp64, from inputs that were rounded to `dtype`."""
    valid_BL, segment_BL, anchor_BL = tokens(case)
    inputs = [vector.double().requires_grad_() for vector in vectors(case, dtype)]
    pairs = sample_pairs(
        valid_BL,
        window=case.window,
        num_negatives=case.num_negatives,
        seed=SEED,
        micro_batch_index=MICRO_BATCH,
        segment_BL=segment_BL,
    )
    hidden_BLD, embedding_BLD = (vector.view(*valid_BL.shape, case.size) for vector in inputs)
    loss = token_contrastive_loss(hidden_BLD, embedding_BLD, *pairs, temperature=TEMPERATURE, anchor_mask_BL=anchor_BL)
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def drawn(
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    *,
    own_tokens: range | None = None,
    factor: float = 1.0,
    is_shuffled: bool = False,
) -> list[Tensor]:
    """`factor` times loss and gradients by the kernels, in fp64 on the CPU.

    With `is_shuffled` the hidden states are those of the valid tokens and of one other, in another order.
    """
    from pretrain.kernels.contrast import drawn_contrastive_loss
    from pretrain.kernels.pairs import pair_key

    valid_G = tokens(case)[0].flatten()
    place_T = token_G = None
    kept_T = torch.arange(len(valid_G))
    if is_shuffled:
        kept_T = torch.cat([valid_G.nonzero()[:, 0], (~valid_G).nonzero()[:1, 0]]).flip(0)
        place_T, token_G = kept_T.to(device), torch.full_like(kept_T[:1], -1).repeat(len(valid_G))
        token_G = token_G.index_copy(0, kept_T, torch.arange(len(kept_T))).to(device)
    inputs = [vector[kept_T].to(device).requires_grad_() for vector in vectors(case, dtype)]
    loss = drawn_contrastive_loss(
        *inputs,
        *(tensor.to(device) for tensor in tokens(case)),
        pair_key(SEED, MICRO_BATCH, device),
        window=case.window,
        num_negatives=case.num_negatives,
        temperature=TEMPERATURE,
        place_T=place_T,
        token_G=token_G,
        own_tokens=own_tokens,
    )
    gradients = torch.autograd.grad(factor * loss, inputs)
    assert loss.dtype == torch.float32
    assert {gradient.dtype for gradient in gradients} == {dtype}
    zeros_GD = torch.zeros(len(valid_G), case.size, dtype=torch.float64)
    spread = [zeros_GD.index_copy(0, kept_T, gradient.cpu().double()) for gradient in gradients]
    return [factor * loss.detach().cpu().double(), *spread]


def deviation(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference, relative to that of what is expected; absolute where that is 0."""
    size = float(expected.norm())
    return float((found - expected).norm()) / (size or 1.0)


# Loss, gradients. An fp16 table has 11 bits: 2e-4 of a gradient. A gradient in 16 bits is rounded to them besides, to 8
# bits in bf16 (Triton's interpreter cuts them off). The loss of few anchors averages little of it.
LIMITS = {torch.float32: (2e-7, 6e-7), torch.float16: (2e-5, 5e-4), torch.bfloat16: (2e-5, 5e-3)}
