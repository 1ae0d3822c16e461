"""The norm of many gradients from one pass over them, which also says whether all of them are finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.data.native import native
from pretrain.optim.native_updates import UpdateKernels, native_squares

# torch's CPU norm adds up in fp32 in a few lanes: over 28 million numbers its square is wrong by 0.3 %. So it sums
# blocks of this many elements, to 1e-7, and fp64 sums the blocks.
_BLOCK = 512


@torch.no_grad()
def squared_norm(tensors: Sequence[Tensor], kernels: UpdateKernels | None = None) -> Tensor:
    """The sum of the squares of all elements, [] fp64; it is finite exactly if every element is.

    The same bits for the same tensors, each time. On a GPU nothing is read back to the host.

    Args:
        tensors: contiguous, on one device, fp32 or 16-bit.
        kernels: who computes; None: the C++ extension on a CPU, torch elsewhere.
    """
    tensors = [tensor for tensor in tensors if tensor.numel()]
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    is_on_cpu = tensors[0].device.type == "cpu"
    if kernels == "native" or (kernels is None and is_on_cpu and native().can_update_buffers()):
        return torch.tensor(sum(native_squares(tensor) for tensor in tensors), dtype=torch.float64)
    if kernels == "triton":
        from pretrain.kernels.norm import fused_squared_norm

        return fused_squared_norm(tensors)
    if not is_on_cpu:
        return torch.stack(torch._foreach_norm(tensors, 2, torch.float64)).square().sum()
    norms = torch.cat([norm for tensor in tensors for norm in _block_norms(tensor.view(-1))])
    total = norms.double().square().sum()
    if total.isfinite():
        return total
    # Squares of finite numbers above 1e19 are infinite in fp32.
    return torch.stack(torch._foreach_norm(tensors, 2, torch.float64)).square().sum()


def _block_norms(tensor_N: Tensor) -> list[Tensor]:
    """fp32 norms of the blocks of a tensor, in one or two vectors."""
    num_whole = tensor_N.numel() // _BLOCK * _BLOCK
    parts = (tensor_N[:num_whole].view(-1, _BLOCK), tensor_N[num_whole:].view(1, -1))
    return [torch.linalg.vector_norm(part, dim=1, dtype=torch.float32) for part in parts if part.numel()]
