"""The tensor-parallel layers against transformers and against the plain ones: logits, gradients, initial weights."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as distributed
from hf_models import VOCAB_SIZE, hf_model, rows, section
from torch import Tensor, nn
from torch.testing import assert_close

from pretrain.model.bert import Bert
from pretrain.model.hf import from_hf_state_dict
from pretrain.model.layer_spec import LayerSpec, plain_layers
from pretrain.model.parameter_shape import parameter_shape
from pretrain.model.tensor_parallel import tensor_parallel_layers
from pretrain.objectives.mlm import masked_lm_loss

pytestmark = pytest.mark.slow  # importing megatron-core alone takes seconds

WORDS = VOCAB_SIZE - 1  # a multiple of 2 and 4
CONFIG = section()
INDEX_M, LABEL_M = torch.tensor([2, 5, 23]), torch.tensor([4, 8, 55])


def _start() -> LayerSpec:
    from megatron.core import parallel_state

    distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(distributed.get_world_size())
    return tensor_parallel_layers()


def _part(full: Tensor | None, parameter: Tensor, layers: LayerSpec) -> Tensor:
    assert full is not None
    return parameter_shape(parameter, layers).part_of(full, layers.tp_rank, layers.tp_size)


def _load(model: nn.Module, full: dict[str, Tensor], layers: LayerSpec) -> None:
    parts = {name: _part(full[name], parameter, layers) for name, parameter in model.named_parameters()}
    model.load_state_dict(parts, strict=True)


def _logits_and_gradients(full: dict[str, Tensor], ids_BL: Tensor, segment_BL: Tensor) -> tuple[Tensor, list[str]]:
    """All logits in fp32, and the parameters whose gradient is not this rank's part of the plain model's."""
    layers = _start()
    model = Bert(CONFIG, WORDS, layers)
    _load(model, full, layers)
    with torch.no_grad():
        logits_BLV = torch.cat(_all_words(model.logits(ids_BL, segment_BL), layers), dim=-1)[..., :WORDS]
    # Gradients in fp64, where rounding (1e-6 of a sum over all tokens in fp32) cannot hide or feign a mistake.
    model.double()
    words = _all_words(model.predict(model.encode(ids_BL, segment_BL)[0], INDEX_M), layers)
    masked_lm_loss(torch.cat(words, dim=-1), LABEL_M)[0].backward()

    plain = Bert(CONFIG, WORDS, plain_layers())
    plain.load_state_dict(full)
    plain.double()
    masked_lm_loss(plain.predict(plain.encode(ids_BL, segment_BL)[0], INDEX_M), LABEL_M)[0].backward()
    expected = {
        name: None if p.grad is None else p.grad[: getattr(p, "num_words", None)]
        for name, p in plain.named_parameters()
    }
    wrong = []
    for name, parameter in model.named_parameters():
        part = _part(expected[name], parameter, layers)
        if parameter.grad is None or not torch.allclose(parameter.grad, part, rtol=0, atol=1e-12):
            wrong.append(name)
    return logits_BLV, wrong


def _all_words(own: Tensor, layers: LayerSpec) -> list[Tensor]:
    """Every rank's logits in rank order; the gradient flows into this rank's own."""
    gathered = [torch.empty_like(own) for _ in range(layers.tp_size)]
    distributed.all_gather(gathered, own.detach().contiguous())
    gathered[layers.tp_rank] = own
    return gathered


def _initial_and_extra(seed: int) -> tuple[list[str], list[str]]:
    """Parameters that are not this rank's part of the plain model's, and entries of the state dict beside them."""
    layers = _start()
    model = Bert(CONFIG, WORDS, layers, seed=seed)
    plain = Bert(CONFIG, WORDS, plain_layers(), seed=seed).state_dict()
    wrong = [n for n, p in model.named_parameters() if not torch.equal(p, _part(plain[n], p, layers))]
    return wrong, [name for name in model.state_dict() if name not in plain]


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_logits_equal_transformers_and_gradients_the_plain_model(tp_size: int) -> None:
    import megatron.core.tensor_parallel  # noqa: F401  # once, before the ranks fork
    from forked import run_ranks

    hf = hf_model(CONFIG, vocab_size=WORDS)
    full = from_hf_state_dict(hf.state_dict(), CONFIG).state
    ids_BL, segment_BL = rows([12, 9], 12, vocab_size=WORDS)
    with torch.no_grad():
        expected_BLV = hf(ids_BL, attention_mask=segment_BL).logits
    is_token = segment_BL.bool()
    for logits_BLV, wrong_gradients in run_ranks(tp_size, _logits_and_gradients, full, ids_BL, segment_BL):
        assert_close(logits_BLV[is_token], expected_BLV[is_token], rtol=0.0, atol=1e-5)
        assert wrong_gradients == []


def test_every_rank_starts_with_its_part_of_the_same_weights() -> None:
    import megatron.core.tensor_parallel  # noqa: F401  # once, before the ranks fork
    from forked import run_ranks

    for wrong, extra in run_ranks(2, _initial_and_extra, 11):
        assert wrong == []
        assert extra == []


def test_sizes_that_cannot_be_split_are_refused() -> None:
    import megatron.core.tensor_parallel  # noqa: F401  # once, before the ranks fork
    from forked import RankFailedError, run_ranks

    for changes, words in (
        ({"num_attention_heads": 1}, "num_attention_heads"),
        ({"ffn_hidden_size": 47}, "47 output features"),
    ):
        with pytest.raises(RankFailedError, match=f"ConfigError.*{words}"):
            run_ranks(2, _build, changes)


def _build(changes: dict[str, int]) -> None:
    Bert(section(**changes), WORDS, _start())
