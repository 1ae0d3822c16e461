"""LAMB (You et al. 2020), exact where ZeRO splits the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
import torch.distributed as distributed

from pretrain.optim.holdable import Holdable


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
