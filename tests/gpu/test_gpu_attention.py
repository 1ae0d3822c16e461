"""Attention of documents on a GPU, by every implementation that is there, against the twin for a CPU in fp64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from pretrain.errors import ConfigError
from pretrain.kernels.attention_choice import AttentionNeeds, choose_attention
from pretrain.model.attention import self_attention, with_mask
from pretrain.model.token_rows import plan_rows

GPU = torch.device("cuda:0")
SIZE = 64


@pytest.mark.parametrize("separate_documents", [False, True])
@pytest.mark.parametrize("attention", ["torch", "varlen", "triton", "flash_attn"])
def test_documents_equal_the_twin(attention: Any, separate_documents: bool) -> None:
    try:
        choose_attention(attention, "triton", AttentionNeeds(GPU, "bf16", 0.0, SIZE, True))
    except ConfigError as error:
        pytest.skip(str(error))
    segment_BL = np.repeat([[1, 2, 3, 0], [1, 1, 0, 0]], [200, 1, 90, 9], axis=1)
    rows = plan_rows(segment_BL, separate_documents=separate_documents)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(rows.num_tokens, 2 * 3 * SIZE, generator=generator).bfloat16()
    slope = torch.randn(rows.num_tokens, 2 * SIZE, generator=generator).bfloat16()
    here, there = qkv.to(GPU).requires_grad_(), qkv.double().requires_grad_()
    segments = torch.from_numpy(segment_BL).to(GPU)
    on_gpu = with_mask(rows.to(GPU), segments, attention, separate_documents=separate_documents)
    output = self_attention(here, on_gpu, SIZE, None, attention)
    expected = self_attention(there, rows, SIZE)
    gradients = [torch.autograd.grad(o, x, slope.to(x))[0] for o, x in ((output, here), (expected, there))]
    # Padding that is computed beside the tokens attends to other things in torch's grid; nothing reads it.
    num_real = np.count_nonzero(segment_BL)
    tolerance = {"rtol": 0.03, "atol": 0.03}
    assert_close(output[:num_real].cpu().double(), expected[:num_real].detach(), **tolerance)
    if attention != "torch":
        assert_close(gradients[0].cpu().double(), gradients[1], **tolerance)
