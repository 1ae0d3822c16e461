"""What a layer keeps for backward, in bytes, and that recomputation changes no bit with dropout on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from pretrain.config.sections import ModelSection
from pretrain.kernels.dropout_mask import NUM_WORDS
from pretrain.model.bert import Bert
from pretrain.model.dropout import DropoutKey
from pretrain.model.layer_spec import plain_layers
from pretrain.model.layers import EncoderLayer
from pretrain.model.token_rows import full_rows

SIZE, ROWS, LENGTH = 64, 3, 32
CONFIG = ModelSection(
    num_layers=2, hidden_size=SIZE, num_attention_heads=4, ffn_hidden_size=4 * SIZE, max_position_embeddings=LENGTH
)
TOKENS = ROWS * LENGTH


def _kept_numbers(*, recomputes_elementwise: bool, dtype: torch.dtype) -> float:
    """Numbers per token and feature that an encoder layer keeps beside its parameters and its input."""
    layers = replace(plain_layers(), recomputes_elementwise=recomputes_elementwise)
    layer = EncoderLayer(CONFIG, layers).to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.05)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    hidden = torch.randn(TOKENS, SIZE, dtype=dtype, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if tensor.is_floating_point() and place not in parameters and place != hidden.data_ptr():
            kept[place] = tensor.untyped_storage().nbytes()
        return tensor

    words = DropoutKey.of(1, 2, 2, torch.device("cpu")).at(2)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(hidden, full_rows(ROWS, LENGTH), words)
    assert out.data_ptr() in kept
    return sum(kept.values()) / (TOKENS * SIZE * dtype.itemsize)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_keeps_no_mask_and_no_sum(dtype: torch.dtype) -> None:
    """qkv 3, context 1, outputs of LayerNorm 2, GELU's input and output 4 + 4; statistics of LayerNorms and heads."""
    statistics = 4 * (2 + CONFIG.num_attention_heads) / (SIZE * dtype.itemsize)
    assert _kept_numbers(recomputes_elementwise=False, dtype=dtype) == pytest.approx(14 + statistics)
    # The hooks of the test see what the hooks of recomputation leave over: GELU's input only.
    assert _kept_numbers(recomputes_elementwise=True, dtype=dtype) == pytest.approx(10 + statistics)


def _gradients(recompute_layers: int, *, recomputes_elementwise: bool) -> list[Tensor]:
    layers = replace(plain_layers(), recomputes_elementwise=recomputes_elementwise)
    model = Bert(CONFIG, 30, layers, seed=3, recompute_layers=recompute_layers)
    ids_BL = torch.arange(TOKENS).view(ROWS, LENGTH) % 30
    key = DropoutKey.of(5, 6, CONFIG.num_layers, torch.device("cpu"))
    hidden_TD, embedding_TD = model.encode(ids_BL, torch.ones_like(ids_BL), key=key)
    loss = (hidden_TD - embedding_TD).square().mean() + model.predict(hidden_TD, torch.arange(5)).square().mean()
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


def test_computing_again_changes_no_bit() -> None:
    expected = _gradients(0, recomputes_elementwise=False)
    for number, elementwise in ((0, True), (1, False), (2, False)):
        found = _gradients(number, recomputes_elementwise=elementwise)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_the_words_of_a_place_lie_apart() -> None:
    """A compiler copies what is not aligned to 16 bytes."""
    key = DropoutKey.of(5, 6, CONFIG.num_layers, torch.device("cpu"))
    assert key.words_IPW.shape[-1] == NUM_WORDS
    assert (key.at(3)[1].data_ptr() - key.words_IPW.data_ptr()) % 16 == 0
