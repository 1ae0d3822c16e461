"""LAMB against a plain transcription of the paper, over whole parameters and over flat buffers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.config.sections import OptimSection
from pretrain.optim import Lamb, build_optimizer
from pretrain.optim.native_updates import UpdateKernels
from pretrain.optim.segments import Segment, SegmentTable

SETTINGS: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.02}


class Reference:
    """You et al. 2020, algorithm 2, line by line, in fp64."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight.double()
        self.mean, self.square, self.step = torch.zeros_like(self.weight), torch.zeros_like(self.weight), 0

    def update(self, gradient: torch.Tensor) -> None:
        gradient, self.step = gradient.double(), self.step + 1
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.square = 0.99 * self.square + 0.01 * gradient**2
        ratio = (self.mean / (1 - 0.9**self.step)) / ((self.square / (1 - 0.99**self.step)).sqrt() + 1e-6)
        update = ratio + 0.02 * self.weight
        norms = self.weight.norm(), update.norm()
        trust = norms[0] / norms[1] if min(norms) > 0 else 1.0
        self.weight = self.weight - 0.1 * trust * update


def test_lamb_equals_the_papers_algorithm() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(3, 4, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)]
    parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
    optimizer, references = Lamb(parameters, **SETTINGS), [Reference(weight) for weight in weights]
    for _ in range(4):
        for parameter, reference in zip(parameters, references, strict=True):
            parameter.grad = torch.randn_like(parameter)
            reference.update(parameter.grad)
        optimizer.step()
        for parameter, reference in zip(parameters, references, strict=True):
            assert torch.allclose(parameter.detach(), reference.weight, rtol=1e-6, atol=0)


def test_lamb_takes_a_plain_step_where_the_weight_is_zero() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    Lamb([parameter], lr=0.1).step()
    assert torch.allclose(parameter.detach(), torch.full((3,), -0.1), atol=1e-5)


# Parameters of ragged lengths in two buffers, with padding before, between and after them.
LENGTHS = [(3, 1, 1037), (17, 530)]


def flat_lamb(**settings: Any) -> tuple[Lamb, list[list[Segment]]]:
    """An optimizer of two buffers, each in a group of its own, and their segments."""
    segments, number = [], 0
    for lengths in LENGTHS:
        start, found = 2, []
        for length in lengths:
            found.append(Segment(number, start, length))
            start, number = start + length + 3, number + 1
        segments.append(found)
    buffers = [torch.nn.Parameter(torch.zeros(2 + sum(lengths) + 3 * len(lengths) + 4)) for lengths in LENGTHS]
    for buffer, found in zip(buffers, segments, strict=True):
        for piece in found:
            torch.nn.init.normal_(buffer.data[piece.start : piece.start + piece.length])
    optimizer = Lamb([{"params": [buffer]} for buffer in buffers], **SETTINGS, **settings)
    optimizer.set_segments(dict(zip(buffers, segments, strict=True)), [False] * number)
    return optimizer, segments


@pytest.mark.parametrize("gradient_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_flat_buffers_equal_the_paper_over_many_steps(kernels: UpdateKernels, gradient_type: torch.dtype) -> None:
    torch.manual_seed(0)
    optimizer, segments = flat_lamb()
    optimizer.kernels = kernels
    buffers = [group["params"][0] for group in optimizer.param_groups]
    copies = [torch.zeros_like(buffer, dtype=torch.bfloat16) for buffer in buffers]
    references = [
        [Reference(part) for part in SegmentTable(found, buffer.numel()).split(buffer.detach())]
        for buffer, found in zip(buffers, segments, strict=True)
    ]
    for step in range(200):
        gradients = [torch.zeros_like(buffer, dtype=gradient_type) for buffer in buffers]
        for gradient, found, expected in zip(gradients, segments, references, strict=True):
            for piece, reference in zip(found, expected, strict=True):
                part = gradient[piece.start : piece.start + piece.length]
                part.copy_(torch.randn(piece.length) + 0.2)
                if step % 50 != 7:
                    reference.update(part.float() * 0.25)
        is_skipped = step % 50 == 7
        if is_skipped:
            gradients[0][0] = torch.nan
        optimizer.update_flat(gradients, copies, gradient_scale=torch.tensor(0.25), skip=torch.tensor(is_skipped))
    for buffer, copy, found, expected in zip(buffers, copies, segments, references, strict=True):
        parts = SegmentTable(found, buffer.numel()).split(buffer.detach())
        for part, reference in zip(parts, expected, strict=True):
            assert torch.allclose(part.double(), reference.weight, rtol=2e-4, atol=2e-5)
        assert torch.equal(copy, buffer.detach().bfloat16())
        assert float(buffer.detach().abs().sum()) == pytest.approx(sum(float(part.abs().sum()) for part in parts))
        assert float(optimizer.state[buffer]["step"]) == 196


@pytest.mark.parametrize(
    ("segments", "problem"),
    [
        ([Segment(0, 0, 3), Segment(1, 2, 2)], "overlaps"),
        ([Segment(0, 0, 0)], "is empty"),
        ([Segment(0, 2, 9)], "leaves its buffer"),
        ([Segment(0, 0, 2), Segment(0, 4, 2)], "two segments"),
    ],
)
def test_a_table_that_cannot_be_is_refused(segments: list[Segment], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        SegmentTable(segments, 10)


class _Count(TorchDispatchMode):
    """Counts dispatched operations."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return function(*args, **(kwargs or {}))


def operations(num_layers: int, name: str) -> int:
    """Dispatched operations of one step over a model of this depth."""
    layers = [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)) for _ in range(num_layers)]
    model = torch.nn.Sequential(*layers)
    optimizer = build_optimizer(model, OptimSection(name=name))  # type: ignore[arg-type]
    with _Count() as count:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        before = count.number
        optimizer.step()
    return count.number - before


@pytest.mark.parametrize(("name", "limit"), [("lamb", 100), ("adamw", 10)])
def test_the_operations_of_a_step_do_not_grow_with_the_model(name: str, limit: int) -> None:
    assert operations(2, name) == operations(8, name) <= limit
