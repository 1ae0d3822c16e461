"""FP8 linears, emulated on the CPU: their error against fp64, where they are refused, and that a model learns."""

from __future__ import annotations

from dataclasses import replace
from statistics import mean

import pytest
import torch
from hf_models import section
from torch import Tensor

from pretrain.config.sections import ObjectiveSection
from pretrain.errors import ConfigError
from pretrain.model.fp8 import Fp8Linear, check_fp8, with_fp8_linears
from pretrain.model.layer_spec import LayerSpec, Linear, plain_layers
from pretrain.model.pretraining import BertForPretraining

WORDS = 61


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [16, 37])
def test_forward_and_gradients_against_fp64(dtype: torch.dtype, num_tokens: int) -> None:
    """e4m3 rounds by 2.6 % and e5m2 by 5 % (rms) per operand; scales of the tensors do not matter."""
    generator = torch.Generator().manual_seed(0)
    hidden, gradient, weight, bias = (
        (scale * torch.randn(shape, generator=generator)).to(dtype)
        for scale, shape in ((3, (num_tokens, 64)), (1e-6, (num_tokens, 96)), (0.02, (96, 64)), (0.02, (96,)))
    )
    linear = Fp8Linear(64, 96).to(dtype)
    linear.load_state_dict({"weight": weight, "bias": bias})
    leaf = hidden.clone().requires_grad_()
    output = linear(leaf)
    found = torch.autograd.grad(output, (leaf, linear.weight, linear.bias), gradient)
    assert [tensor.dtype for tensor in (output, *found)] == [dtype] * 4
    hidden, gradient, weight, bias = (tensor.double() for tensor in (hidden, gradient, weight, bias))
    assert relative_error(output.detach(), hidden @ weight.t() + bias) < 0.04
    assert relative_error(found[0], gradient @ weight) < 0.07
    assert relative_error(found[1], gradient.t() @ hidden) < 0.07
    assert relative_error(found[2], gradient.sum(dim=0)) < 0.01


def test_only_the_linears_of_the_encoder_are_in_fp8() -> None:
    model = _model(with_fp8_linears(plain_layers()))
    names = [name for name, module in model.named_modules() if isinstance(module, Fp8Linear)]
    parts = ("qkv", "attention_out", "ffn_in", "ffn_out")
    assert names == [f"{layer}.{part}" for layer in (2, 3) for part in parts]
    assert type(model.get_submodule("4.dense")) is Linear
    plain = _model(plain_layers())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def _model(layers: LayerSpec) -> BertForPretraining:
    return BertForPretraining(section(), WORDS, layers, ObjectiveSection(num_negatives=4), seed=3)


def _micro_batch(index: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    """Rows that count upwards from a random word: the masked words follow from their neighbours."""
    generator = torch.Generator().manual_seed(index)
    first_B1 = torch.randint(1, WORDS, (8, 1), generator=generator)
    ids_BL = (first_B1 + torch.arange(20)) % (WORDS - 1) + 1
    index_M = torch.randperm(160, generator=generator)[:24]
    label_M = ids_BL.flatten()[index_M]
    ids_BL.view(-1)[index_M] = 0
    return ids_BL, torch.ones_like(ids_BL), torch.ones(8, 20, dtype=torch.bool), index_M, label_M, index


def _learn(layers: LayerSpec, steps: int) -> list[float]:
    """Total losses of a bf16 model with fp32 master weights, as the engine trains it."""
    model = _model(layers).bfloat16()
    masters = [parameter.detach().float().requires_grad_() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=3e-3)
    losses = []
    for step in range(steps):
        total = model(*_micro_batch(step)).total
        total.backward()
        losses.append(float(total.detach()))
        for master, parameter in zip(masters, model.parameters(), strict=True):
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, model.parameters(), strict=True):
                parameter.copy_(master)
    return losses


@pytest.mark.slow
def test_a_model_learns_in_fp8_as_in_bf16() -> None:
    """The mean loss of the last steps is within 5 % of that in bf16, after a fall by more than half."""
    in_bf16, in_fp8 = (_learn(layers, 150) for layers in (plain_layers(), with_fp8_linears(plain_layers())))
    assert in_fp8[0] == pytest.approx(in_bf16[0], rel=0.02)
    last_bf16, last_fp8 = mean(in_bf16[-20:]), mean(in_fp8[-20:])
    assert last_bf16 < 0.5 * in_bf16[0]
    assert abs(last_fp8 - last_bf16) < 0.05 * last_bf16


def test_devices_without_fp8_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="a CPU has no FP8 products; set precision=bf16, or fp8.emulate=true"):
        check_fp8(torch.device("cpu"), is_emulated=False)
    check_fp8(torch.device("cpu"), is_emulated=True)
    gpu = torch.device("cuda", 0)
    with pytest.raises(ConfigError, match="fp8.emulate=true is for a CPU.*leave it out"):
        check_fp8(gpu, is_emulated=True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(ConfigError, match=r"NVIDIA A100 \(compute capability 8.0\).*set precision=bf16"):
        check_fp8(gpu, is_emulated=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    check_fp8(gpu, is_emulated=False)


def test_sizes_that_fp8_cannot_multiply_are_refused() -> None:
    with pytest.raises(ConfigError, match="a linear of 40 output features.*multiple of 16"):
        with_fp8_linears(replace(plain_layers())).column_linear(32, 40)
