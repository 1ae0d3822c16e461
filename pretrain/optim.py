"""Parameter groups, optimizers, and learning-rate schedules as pure functions of the step.

The learning rate is computed from (step, configuration) at every step, so a resumed run needs no scheduler state.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, overload

import torch
import torch.distributed as distributed

from pretrain.config.sections import OptimSection


def learning_rate(step: int, optim: OptimSection, total_steps: int) -> float:
    """The learning rate of optimizer step `step` (0-based): linear warm-up, then linear, cosine or WSD decay.

    WSD (warm-up, stable, decay; Hu et al. 2024, MiniCPM, section 4) keeps the peak until the last `decay_steps`.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    floor = optim.lr * optim.min_lr_ratio
    remaining = optim.lr - floor
    if optim.schedule == "wsd":
        decay_steps = optim.decay_steps or max(1, total_steps // 10)
        start = max(total_steps - decay_steps, optim.warmup_steps)
    else:
        start = optim.warmup_steps
    progress = min(1.0, max(0.0, (step - start) / max(1, total_steps - start)))
    if optim.schedule == "cosine":
        return floor + remaining * 0.5 * (1.0 + math.cos(math.pi * progress))
    return floor + remaining * (1.0 - progress)


def is_decayed(name: str, parameter: torch.Tensor) -> bool:
    """True for matrices and embeddings; biases and LayerNorm are not decayed (the BERT authors' optimization.py)."""
    return parameter.dim() >= 2 and not name.endswith("bias")


def is_tensor_parallel(parameter: torch.Tensor) -> bool:
    """True if each tensor-parallel rank holds a different part of the parameter."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


def parameter_groups(model: torch.nn.Module, weight_decay: float, *, one_each: bool) -> list[dict[str, Any]]:
    """Parameters with and without weight decay; with `one_each`, a group per parameter (see `_LambUpdate`)."""
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if is_decayed(name, parameter) else plain).append(parameter)
    if one_each:
        return [
            {"params": [parameter], "weight_decay": decay, "is_tensor_parallel": is_tensor_parallel(parameter)}
            for decay, parameters in ((weight_decay, decayed), (0.0, plain))
            for parameter in parameters
        ]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: torch.nn.Module,
    optim: OptimSection,
    *,
    shard_group: distributed.ProcessGroup | None,
    tensor_group: distributed.ProcessGroup | None = None,
) -> AdamW | Lamb:
    """AdamW or LAMB over the model's parameters, on whichever device ZeRO keeps the state.

    `shard_group` is the group over which ZeRO will split each parameter group, `tensor_group` the one whose ranks hold
    parts of the tensor-parallel parameters; None if nothing is split.
    """
    groups = parameter_groups(model, optim.weight_decay, one_each=optim.name == "lamb")
    if optim.name == "lamb":
        return Lamb(
            groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, shard_group=shard_group, tensor_group=tensor_group
        )
    # One fused kernel per step instead of several passes over all state; torch has it for CPU and CUDA.
    return AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


class Holdable:
    """A mixin before an optimizer class, with which its step can be held.

    DeepSpeed does more in a step than update: it unscales, clips, counts, clears gradients. With the optimizer held,
    all of that happens but no weight or moment changes.
    """

    _is_held = False

    @contextmanager
    def held(self, is_held: bool) -> Iterator[None]:
        """While this context lasts, `step` changes nothing if `is_held`."""
        self._is_held = is_held
        try:
            yield
        finally:
            self._is_held = False

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """One update, unless the optimizer is held."""
        return None if self._is_held else super().step(*args, **kwargs)  # type: ignore[misc]


class AdamW(Holdable, torch.optim.AdamW):  # type: ignore[misc]  # torch types `step` by two overloads
    """torch's AdamW, whose step can be held.

    Its step is called without its wrapper, which loads TorchDynamo to end a compiled graph that does not exist.
    """

    _step = staticmethod(torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step)))

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """One update, unless the optimizer is held."""
        return None if self._is_held else self._step(self, *args, **kwargs)


class _LambUpdate(torch.optim.Optimizer):
    """LAMB (You et al. 2020, algorithm 2) that stays exact when ZeRO splits the parameters.

    ZeRO hands an optimizer flat slices, over which a trust ratio per layer would silently become a ratio per slice.
    With one parameter per group (`parameter_groups(one_each=True)`) a slice belongs to one parameter, and the norms are
    summed over `shard_group`: in one collective per step, or one per parameter under ZeRO-3, which steps each group by
    itself. Padding in a slice is zero and adds nothing.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        shard_group: distributed.ProcessGroup | None = None,
        tensor_group: distributed.ProcessGroup | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.shard_group = shard_group
        self.tensor_group = tensor_group

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter."""
        loss = closure() if closure is not None else None
        shards = [(p, group) for group in self.param_groups for p in group["params"]]
        if not shards:
            return loss
        updates = [self._update(p, group) if p.grad is not None else None for p, group in shards]
        is_split = [group.get("is_tensor_parallel", False) for _, group in shards]
        norms = self._norms([p for p, _ in shards], updates, is_split)
        for (parameter, group), update, (weight_norm, update_norm) in zip(shards, updates, norms.unbind(), strict=True):
            if update is None:
                continue
            is_defined = (weight_norm > 0) & (update_norm > 0)
            ratio = torch.where(is_defined, weight_norm / update_norm, torch.ones_like(weight_norm))
            parameter.sub_(update.mul_((ratio * group["lr"]).to(update.dtype)))
        return loss

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        gradient = parameter.grad
        assert gradient is not None
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        step = float(state["step"])
        mean = state["exp_avg"] / (1 - beta1**step)
        deviation = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        return mean.div_(deviation).add_(parameter, alpha=group["weight_decay"])

    def _norms(
        self, parameters: list[torch.Tensor], updates: list[torch.Tensor | None], is_split: list[bool]
    ) -> torch.Tensor:
        """Norms of weight and update, shape [number of parameters, 2], over all slices and parts of each parameter."""
        squares = torch.stack(
            [
                torch.stack([p.float().square().sum(), p.new_zeros(()) if u is None else u.float().square().sum()])
                for p, u in zip(parameters, updates, strict=True)
            ]
        )
        if self.shard_group is not None:
            distributed.all_reduce(squares, group=self.shard_group)
        if self.tensor_group is not None:
            is_split_N1 = torch.tensor(is_split, device=squares.device)[:, None]
            total = squares * is_split_N1
            distributed.all_reduce(total, group=self.tensor_group)
            squares = torch.where(is_split_N1, total, squares)
        return squares.sqrt()


class Lamb(Holdable, _LambUpdate):  # type: ignore[misc]
    """LAMB, whose step can be held."""


def initial_state(optimizer: torch.optim.Optimizer, tensor: torch.Tensor, num_steps: int) -> dict[str, Any]:
    """State of a tensor that was updated `num_steps` times, with moments that are still to be filled in (zeros)."""
    moments = {kind: torch.zeros_like(tensor, requires_grad=False) for kind in ("exp_avg", "exp_avg_sq")}
    if isinstance(optimizer, torch.optim.AdamW):
        step: Any = torch.tensor(
            float(num_steps), dtype=torch.float32, device=tensor.device
        )  # fused kernels need it there
    elif isinstance(optimizer, Lamb):
        step = torch.tensor(float(num_steps), dtype=torch.float32)
    else:  # DeepSpeed's Adams count in Python
        step = num_steps
    return {"step": step, **moments}
