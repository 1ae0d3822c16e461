"""One GPU against one plain process on the CPU: losses, gradient norm, weights and pairs of five steps.

The list of `make parity` as far as one process goes, and what only a GPU has: fp16, DeepSpeed's fused optimizers,
copies from page-locked memory. Dropout draws other units on a GPU, so there layouts are compared with each other.
"""

from __future__ import annotations

import shutil
from dataclasses import astuple
from math import inf
from pathlib import Path

import pytest
import torch.utils.cpp_extension
from layouts import DOCUMENT, DROPOUT, LAMB, MASKED, PACK, PLAIN, UNMASKED, Case, Grid
from parity import (
    LIMITS,
    Deviation,
    Outcome,
    Weights,
    compare,
    draw_same_pairs,
    initial_weights,
    layout_outcomes,
    plain_outcomes,
)

ONE = Grid()
OFFLOADED = "zero.offload_optimizer={device: cpu}"
FUSED = "optim.implementation=deepspeed"
ON_GPU = ("run.device=cuda",)
SETTINGS = (PLAIN, DOCUMENT, PACK, MASKED, UNMASKED, LAMB)

Wanted = dict[str, tuple[Case, tuple[str, ...]]]
IN_FP32: Wanted = {
    **{f"ZeRO-{zero}": (Case(ONE, zero), ()) for zero in range(4)},
    **{f"ZeRO-{zero}, all layers again": (Case(ONE, zero, "all"), ()) for zero in range(4)},
    "ZeRO-1, 3 layers again": (Case(ONE, 1, 3), ()),
    **{setting: (Case(ONE, setting=setting), ()) for setting in SETTINGS[1:]},
    **{f"LAMB, ZeRO-{zero}": (Case(ONE, zero, setting=LAMB), ()) for zero in (0, 2, 3)},
    **{f"ZeRO-{zero}, optimizer offloaded": (Case(ONE, zero), (OFFLOADED,)) for zero in (1, 2, 3)},
    "ZeRO-3, all offloaded": (Case(ONE, 3), (OFFLOADED, "zero.offload_param={device: cpu}")),
    "deterministic kernels": (Case(ONE), ("train.deterministic=true",)),
}
IN_16_BITS: Wanted = {
    f"{precision}, ZeRO-{zero}{', all layers again' if again else ''}": (Case(ONE, zero, again, precision), ())
    for precision in ("bf16", "fp16")
    for zero in (1, 2, 3)
    for again in (0, "all")
}
# Against fp32: every 16-bit number is rounded, while in LIMITS both sides of a comparison are.
LIMIT_16_BITS = Deviation(inf, 0.02, 0.2, 0.4, 0.03, 0.8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, Outcome]:
    return plain_outcomes(folder, SETTINGS)


@pytest.fixture(scope="module")
def initial(folder: Path, plain: dict[str, Outcome]) -> Weights:
    return initial_weights(folder)


def on_gpu(folder: Path, case: Case, *overrides: str) -> list[Outcome]:
    """What the one rank on the GPU finds; a process of its own, since some settings are those of a whole process."""
    return layout_outcomes(folder, [case], (*ON_GPU, *overrides))[0]


def check(name: str, found: list[Outcome], expected: Outcome, initial: Weights, limits: Deviation) -> None:
    far = compare(found, expected, initial)
    print(f"deviation | {name} | {' | '.join(f'{value:.1e}' for value in astuple(far))} |")
    assert draw_same_pairs(found, expected)
    assert far.is_within(limits), far


@pytest.mark.parametrize("name", IN_FP32)
def test_fp32_equals_the_plain_process(name: str, folder: Path, plain: dict[str, Outcome], initial: Weights) -> None:
    case, overrides = IN_FP32[name]
    check(name, on_gpu(folder, case, *overrides), plain[case.setting], initial, LIMITS["fp32"])


@pytest.mark.parametrize("name", IN_16_BITS)
def test_16_bits_are_near_the_plain_process(
    name: str, folder: Path, plain: dict[str, Outcome], initial: Weights
) -> None:
    case, overrides = IN_16_BITS[name]
    # The first scale fits: a skipped step would be none of the five.
    overrides = (*overrides, "fp16.initial_scale_power=10") if case.precision == "fp16" else overrides
    check(name, on_gpu(folder, case, *overrides), plain[case.setting], initial, LIMIT_16_BITS)


@pytest.mark.parametrize("zero", [0, 1, 3])
@pytest.mark.parametrize("is_offloaded", [False, True])
def test_deepspeeds_optimizers(
    zero: int,
    is_offloaded: bool,
    folder: Path,
    plain: dict[str, Outcome],
    initial: Weights,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if is_offloaded and zero == 0:
        pytest.skip("nothing to offload without ZeRO")
    if torch.utils.cpp_extension.CUDA_HOME is None or shutil.which("ninja") is None:
        pytest.skip("DeepSpeed builds its optimizers with nvcc and ninja")
    # An image's list for other builds may hold names that DeepSpeed cannot read; without one it asks the GPU.
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    overrides = (FUSED, OFFLOADED) if is_offloaded else (FUSED,)
    name = f"ZeRO-{zero}, DeepSpeed{'CPU' if is_offloaded else 'Fused'}Adam"
    check(name, on_gpu(folder, Case(ONE, zero), *overrides), plain[PLAIN], initial, LIMITS["fp32"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_layers(precision: str, folder: Path, plain: dict[str, Outcome], initial: Weights) -> None:
    case = Case(ONE, precision=precision)  # type: ignore[arg-type]
    found = on_gpu(folder, case, "train.compile=true")
    limits = LIMIT_16_BITS if precision == "bf16" else Deviation(*(3 * value for value in astuple(LIMITS["fp32"])))
    check(f"compiled, {precision}", found, plain[PLAIN], initial, limits)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputing_drops_the_same_units(precision: str, folder: Path) -> None:
    """To the last bit, where kernels repeat to the last bit."""
    cases = [Case(ONE, 1, again, precision, DROPOUT) for again in (0, 3, "all")]  # type: ignore[arg-type]
    kept, *recomputed = layout_outcomes(folder, cases, (*ON_GPU, "train.deterministic=true"))
    for (again,) in recomputed:
        assert again.num_attentions > kept[0].num_attentions
        assert again.figures == kept[0].figures
        assert all(torch.equal(again.weights[name], weight) for name, weight in kept[0].weights.items())
