"""Whether ranks that hold copies of one parameter still hold the same bits, and which rank is wrong if they do not.

Data-parallel ranks hold copies of what ZeRO-3 does not slice, tensor-parallel ranks of what is not split (LayerNorm,
row biases, position embeddings), and the first and last pipeline stage of the word matrix. Each copy becomes one
integer on its own device, and one small collective compares them; only if they differ do ranks exchange more. Equal
inputs and equal kernels keep copies equal bit for bit, so any difference is a fault: broken memory, a broken link, or a
bug. (BLOOM's LayerNorm weights drifted apart for weeks before anybody noticed.)

Shape letters: N elements of a parameter, C of them at once, K copied parameters.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from pretrain.errors import TacoError
from pretrain.optim import is_tensor_parallel
from pretrain.parallel import collectives
from pretrain.parallel.mesh import Mesh

_CHUNK = 1 << 20
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Odd, so that multiplying by it loses no bit modulo 2^64: the golden ratio's fraction (Knuth, vol. 3, section 6.4).
_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)
_ABSENT = torch.iinfo(torch.int64).min


class ReplicaDriftError(TacoError):
    """Copies of a parameter differ; nothing is saved."""


@dataclass(frozen=True)
class Drift:
    """Ranks that hold different bits of one parameter: groups that agree among themselves, the largest first."""

    name: str
    groups: tuple[tuple[int, ...], ...]

    @property
    def wrong_ranks(self) -> tuple[int, ...]:
        """All ranks outside the largest group; none if the two largest groups are equally large."""
        if len(self.groups[0]) == len(self.groups[1]):
            return ()
        return tuple(sorted(rank for group in self.groups[1:] for rank in group))

    def __str__(self) -> str:
        if self.wrong_ranks:
            return f"{self.name} on {_ranks(self.wrong_ranks)} differs from {_ranks(self.groups[0])}"
        return f"{self.name} differs between {' and '.join(_ranks(group) for group in self.groups)}"


class ReplicaCheck:
    """Compares the copies that the ranks of a run hold; the constructor and each call are collective.

    Args:
        module: this rank's part of the model, as DeepSpeed holds it.
    """

    def __init__(self, module: nn.Module, mesh: Mesh, device: torch.device) -> None:
        self._module = module
        self._mesh = mesh
        self._device = device
        holders = Counter(
            name for names in collectives.gather_objects([name for name, _ in self._parts()]) for name in names
        )
        self._names = sorted(name for name, number in holders.items() if number > 1)
        self._place = {name: place for place, name in enumerate(self._names)}

    @torch.no_grad()
    def find_drift(self) -> list[Drift]:
        """Every parameter whose copies differ, the same list on every rank."""
        if not self._names:
            return []
        sums_2K = self._local_checksums()
        distributed.all_reduce(sums_2K, op=distributed.ReduceOp.MAX)
        # ~x falls where x rises, so the second row holds the complement of the smallest checksum.
        differs_K = (sums_2K[0] != ~sums_2K[1]) & (sums_2K[1] != _ABSENT)
        if not bool(differs_K.any()):
            return []
        return self._explain([self._names[place] for place in differs_K.nonzero().flatten().tolist()])

    def _local_checksums(self) -> Tensor:
        """Checksums and their complements, int64 [2, K]; the smallest int64 where this rank has no copy."""
        sums_2K = torch.full((2, len(self._names)), _ABSENT, dtype=torch.int64, device=self._device)
        sum_by_place = {self._place[name]: checksum(part).to(self._device) for name, part in self._copies()}
        if sum_by_place:
            sums = torch.stack(list(sum_by_place.values()))
            sums_2K[:, torch.tensor(list(sum_by_place), device=self._device)] = torch.stack([sums, ~sums])
        return sums_2K

    def _explain(self, names: Sequence[str]) -> list[Drift]:
        sum_by_name = {name: int(checksum(part)) for name, part in self._copies() if name in names}
        by_rank = collectives.gather_objects(sum_by_name)
        drifts = []
        for name in names:
            groups: dict[int, list[int]] = {}
            for rank, sums in enumerate(by_rank):
                if name in sums:
                    groups.setdefault(sums[name], []).append(rank)
            ordered = sorted(groups.values(), key=lambda ranks: (-len(ranks), ranks))
            drifts.append(Drift(name, tuple(tuple(ranks) for ranks in ordered)))
        return drifts

    def _copies(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, part) for name, part in self._parts() if name in self._place)

    def _parts(self) -> Iterator[tuple[str, Tensor]]:
        """The parts that this rank holds, each under a name that describes it in full: equal names mean copies."""
        for name, parameter in self._module.named_parameters():
            part_of = f" part {self._mesh.tp_rank}" if is_tensor_parallel(parameter) and self._mesh.tp_size > 1 else ""
            if getattr(parameter, "ds_persist", not hasattr(parameter, "ds_tensor")):
                yield name + part_of, parameter
            else:
                yield f"{name}{part_of} slice {self._mesh.dp_rank}", _slice(parameter, self._mesh.dp_rank)


def _slice(parameter: nn.Parameter, rank: int) -> Tensor:
    """This rank's slice under ZeRO-3, without the padding of the last one; a placeholder while it lies on a disk."""
    tensor: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
    length = min(tensor.ds_numel, parameter.ds_numel - rank * tensor.ds_numel)  # type: ignore[attr-defined]
    return tensor.flatten()[: max(0, length)]


def checksum(tensor: Tensor) -> Tensor:
    """An int64 scalar on the tensor's device that changes with every bit and with the order of the elements.

    The sum of every element's bits, as an integer, times a factor of its place, modulo 2^64: nothing is rounded, the
    order of summation does not matter, one changed element always shows, and several cancel with a chance of 2^-64.
    """
    bits_N = tensor.detach().contiguous().flatten()
    bits_N = bits_N.view(_INTEGERS[bits_N.element_size()])
    factor_C = _place_factors(bits_N.device)
    total = torch.zeros((), dtype=torch.int64, device=bits_N.device)
    for chunk_C in bits_N.split(_CHUNK):
        total = total * _FACTOR + (chunk_C * factor_C[: chunk_C.numel()]).sum()
    return total


@lru_cache(maxsize=2)  # 8 MB on the GPU, and on the CPU where weights are offloaded
def _place_factors(device: torch.device) -> Tensor:
    """Odd 64-bit integers that look drawn at random, one per place (SplitMix64's finaliser, Steele et al. 2014)."""
    mixed_C = torch.arange(1, _CHUNK + 1, device=device) * _FACTOR
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed_C = (mixed_C ^ _shift_right(mixed_C, shift)) * (factor - (1 << 64))
    return (mixed_C ^ _shift_right(mixed_C, 31)) | 1


def _shift_right(word_C: Tensor, places: int) -> Tensor:
    """Logical, where torch's own keeps the sign."""
    return (word_C >> places) & ((1 << (64 - places)) - 1)


def describe_drift(drifts: Sequence[Drift], step: int, last_saved_step: int) -> str:
    """One paragraph for people: what differs where, what is safe, and what to do; collective."""
    hosts = collectives.gather_objects(socket.gethostname())
    shown = "; ".join(str(drift) for drift in drifts[:3])
    more = f"; and {len(drifts) - 3} more" if len(drifts) > 3 else ""
    suspects = sorted({rank for drift in drifts for rank in drift.wrong_ranks or chain(*drift.groups)})[:8]
    where = ", ".join(f"rank {rank} runs on {hosts[rank]}" for rank in suspects)
    saved = f"the last checkpoint is of step {last_saved_step}" if last_saved_step else "there is no checkpoint yet"
    return (
        f"step {step}: copies of a parameter are no longer equal: {shown}{more} ({where}); none of this is "
        f"saved, {saved}; give the same command again to continue from there, and if it comes back on the same ranks, "
        "leave out their GPUs or node"
    )


def _ranks(ranks: Sequence[int]) -> str:
    """`rank 3` or `ranks 0-2, 5`."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
