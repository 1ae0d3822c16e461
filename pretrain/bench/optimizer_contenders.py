"""The contenders of `taco bench optimizer`: functions that take one step over flat buffers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.errors import TacoError
from pretrain.kernels.choice import choose_kernels
from pretrain.optim import AdamW, Lamb, squared_norm
from pretrain.optim.native_updates import UpdateKernels
from pretrain.optim.segments import Segment

LR, BETAS, EPS, DECAY, CLIP = 1e-4, (0.9, 0.999), 1e-6, 0.01, 1.0


@dataclass(frozen=True)
class Problem:
    """What a step works on: two flat buffers, of parameters with and without weight decay.

    Attributes:
        lengths: of the parameters of each buffer.
        weights: fp32.
        gradients, copies: in the precision of the model.
    """

    lengths: tuple[list[int], list[int]]
    weights: list[Tensor]
    gradients: list[Tensor]
    copies: list[Tensor]
    device: torch.device

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups over the buffers."""
        return [
            {"params": [weight], "weight_decay": decay}
            for weight, decay in zip(self.weights, (DECAY, 0.0), strict=True)
        ]


def build_problem(shape: dict[str, Any]) -> Problem:
    """A BERT's parameters with random values."""
    size, layers = shape["hidden_size"], shape["num_layers"]
    matrices = [shape["vocab_size"] * size, 512 * size, *[size * size, 3 * size * size, 4 * size * size] * layers]
    matrices += [4 * size * size] * layers
    vectors = [size, size, *[size, size, size, size, size, 3 * size, 4 * size] * layers]
    device = torch.device(shape["device"])
    dtype = torch.bfloat16 if shape["precision"] == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(sum(n), generator=generator).mul_(0.02).to(device) for n in (matrices, vectors)]
    gradients = [torch.randn(weight.numel(), generator=generator).to(device, dtype) for weight in weights]
    return Problem((matrices, vectors), weights, gradients, [weight.to(dtype) for weight in weights], device)


def ours(problem: Problem, name: str) -> Callable[[], None]:
    """The step of this project, as its engine takes it."""
    kernels: UpdateKernels = choose_kernels("auto", problem.device)
    if problem.device.type == "cpu":
        kernels = "native"
    optimizer: AdamW | Lamb
    if name == "lamb":
        optimizer = Lamb(problem.groups, lr=LR, betas=BETAS, eps=EPS)
        segments: dict[Tensor, list[Segment]] = {}
        number = 0
        for weight, lengths in zip(problem.weights, problem.lengths, strict=True):
            start, segments[weight] = 0, []
            for length in lengths:
                segments[weight].append(Segment(number, start, length))
                start, number = start + length, number + 1
        optimizer.set_segments(segments, [False] * number)
    else:
        optimizer = AdamW(problem.groups, lr=LR, betas=BETAS, eps=EPS)
    optimizer.kernels = kernels

    def step() -> None:
        norm = squared_norm(problem.gradients, kernels).sqrt()
        scale = (CLIP / (norm + 1e-6)).clamp(max=1.0).float()
        optimizer.update_flat(problem.gradients, problem.copies, gradient_scale=scale, skip=~norm.isfinite())

    return step


def _clipped(problem: Problem) -> None:
    """Sets fp32 gradients, clipped as torch and DeepSpeed do it: norm, product."""
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in problem.gradients]
    scale = (CLIP / (torch.stack(norms).norm() + 1e-6)).clamp(max=1.0)
    for weight, gradient in zip(problem.weights, problem.gradients, strict=True):
        weight.grad = gradient.to(torch.float32, copy=True).mul_(scale)


def _finish(problem: Problem) -> None:
    for weight, copy in zip(problem.weights, problem.copies, strict=True):
        copy.copy_(weight)
        weight.grad = None


def with_optimizer(problem: Problem, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Clipping, an optimizer's own step, and the copy, one after the other."""

    def step() -> None:
        _clipped(problem)
        optimizer.step()
        _finish(problem)

    return step


def deepspeeds(problem: Problem) -> torch.optim.Optimizer:
    """DeepSpeed's fused kernel for the device, which it builds at the first use."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    kind = DeepSpeedCPUAdam if problem.device.type == "cpu" else FusedAdam
    try:
        optimizer: torch.optim.Optimizer = kind(problem.groups, lr=LR, betas=BETAS, eps=EPS)
    except (ImportError, OSError, RuntimeError, ValueError) as error:  # any failure of its builder
        raise TacoError(f"--only adamw-deepspeed: DeepSpeed cannot build {kind.__name__} here: {error}") from error
    return optimizer


def lamb_loop(problem: Problem) -> Callable[[], None]:
    """LAMB (You et al. 2020), parameter by parameter."""
    moments = [(torch.zeros_like(weight), torch.zeros_like(weight)) for weight in problem.weights]
    num_steps = 0

    def step() -> None:
        nonlocal num_steps
        num_steps += 1
        _clipped(problem)
        corrections = [1 - beta**num_steps for beta in BETAS]
        for weight, (means, squares), lengths, decay in zip(
            problem.weights, moments, problem.lengths, (DECAY, 0.0), strict=True
        ):
            assert weight.grad is not None
            flats = [flat.split_with_sizes(lengths) for flat in (weight, weight.grad, means, squares)]
            for w, g, mean, square in zip(*flats, strict=True):
                mean.lerp_(g, 1 - BETAS[0])
                square.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
                update = (mean / corrections[0]).div_((square / corrections[1]).sqrt_().add_(EPS))
                update.add_(w, alpha=decay)
                w.sub_(update.mul_(w.norm() / update.norm() * LR))
        _finish(problem)

    return step


def build_step(contender: str, problem: Problem) -> Callable[[], None]:
    """The step of a contender."""
    if contender in ("adamw", "lamb"):
        return ours(problem, contender)
    if contender == "lamb-loop":
        return lamb_loop(problem)
    if contender == "adamw-deepspeed":
        return with_optimizer(problem, deepspeeds(problem))
    return with_optimizer(problem, torch.optim.AdamW(problem.groups, lr=LR, betas=BETAS, eps=EPS, fused=True))


@torch.no_grad()
def measure(contender: str, shape: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each step of one contender, in this process: of all its cores on a CPU, on the wall for a GPU."""
    torch.set_num_threads(shape["threads"])
    problem = build_problem(shape)
    step = build_step(contender, problem)
    is_gpu = problem.device.type == "cuda"
    clock = time.perf_counter if is_gpu else time.process_time  # other work stretches wall-clock time on a CPU
    seconds = []
    for number in range(shape["steps"] + 2):
        start = clock()
        step()
        if is_gpu:
            torch.cuda.synchronize(problem.device)
        if number > 1:
            seconds.append(clock() - start)
    return {
        "seconds": seconds,
        "num_parameters": sum(weight.numel() for weight in problem.weights),
        "device_name": torch.cuda.get_device_name(problem.device) if is_gpu else "cpu",
    }
