"""How fast a device multiplies the matrices of a run: a ceiling that was measured, where and when the run is.

The products are those of one encoder layer over a micro-batch, forward, in the run's precision. Only they are timed:
what a step takes above it is attention, element-wise work, the optimizer, communication, or waiting.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from pretrain.config.sections import RunConfig
from pretrain.planner.devices import Arithmetic

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # for fp8: bf16
_MOST_CPU_TOKENS = 4096  # a CPU is as fast with them as with more, and a start should not take seconds
_SECONDS = {"cpu": 0.05, "cuda": 0.03}
_FEWEST_CPU_CALLS = 5  # of which the others may have had the cores for a moment


def arithmetic_of(config: RunConfig, device: torch.device) -> Arithmetic:
    """Which of a device's peaks the products of a run go by."""
    if config.precision == "fp32" and device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    return config.precision


def measured_in(config: RunConfig) -> str:
    """The precision of the measured products: that of the run, or bf16 for one that torch does not multiply."""
    return config.precision if config.precision in _DTYPES else "bf16"


def measure_matmul(config: RunConfig, device: torch.device) -> float:
    """Operations per second of the products of an encoder layer; takes 0.1 s, and no random number of the run."""
    products = _products(config, device)
    operations = sum(2 * left.shape[0] * left.shape[1] * right.shape[1] for left, right in products)
    outputs = [left @ right for left, right in products]  # also the warm-up

    def multiply() -> None:
        for (left, right), out in zip(products, outputs, strict=True):
            torch.mm(left, right, out=out)

    return operations / _seconds(multiply, device)


def _products(config: RunConfig, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs of the four products, of this rank's share of the features."""
    model, ranks = config.model, config.parallel.tensor
    tokens = config.train.micro_batch_size * config.data.seq_length
    if device.type == "cpu":
        tokens = min(tokens, _MOST_CPU_TOKENS)
    dtype = _DTYPES[measured_in(config)]
    # Values of ordinary size: a GPU multiplies zeros faster than it can anything else.
    generator = torch.Generator(device).manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator, device=device).to(dtype)

    size, inner, heads = model.hidden_size, model.ffn_hidden_size // ranks, model.hidden_size // ranks
    hidden, context, activation = matrix(tokens, size), matrix(tokens, heads), matrix(tokens, inner)
    return [
        (hidden, matrix(size, 3 * heads)),
        (context, matrix(heads, size)),
        (hidden, matrix(size, inner)),
        (activation, matrix(inner, size)),
    ]


def _seconds(action: Callable[[], None], device: torch.device) -> float:
    """Of one call: the fastest on a CPU, whose cores others use too; the mean of many on a GPU, whose clock settles."""
    if device.type == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        action()
        torch.cuda.synchronize(device)
        once = _timed_on_host(action, device)
        number = max(1, round(_SECONDS["cuda"] / once))
        first.record()
        for _ in range(number):
            action()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1000 / number
    calls, end = [_timed_on_host(action, device)], time.perf_counter() + _SECONDS["cpu"]
    while time.perf_counter() < end or len(calls) < _FEWEST_CPU_CALLS:
        calls.append(_timed_on_host(action, device))
    return min(calls)


def _timed_on_host(action: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(time.perf_counter() - start, 1e-9)
