"""Weights that make the plain mean of micro-batch losses the mean over all masked tokens of an optimizer step.

Gradients and reported losses are averaged over micro-batches and data-parallel ranks with equal weights. So the MLM
loss of a micro-batch, a mean over its own n masked tokens, is multiplied by n over the mean of n over all micro-batches
of the step: the mean of these products is the sum over all masked tokens, divided by their number. Rows are masked on
the host, so a rank knows its own n before forward; one sum over the data-parallel ranks runs beside the first forward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pretrain.data.batches import Batch
from pretrain.model.pretraining import PretrainingLosses
from pretrain.parallel.collectives import PendingSum
from pretrain.parallel.mesh import Mesh


class TokenMean:
    """The weights of the micro-batches of one optimizer step; every data-parallel rank makes one, at the same time.

    Nothing is read back from the device: the weights are tensors there, and the host never waits for a GPU.
    """

    def __init__(self, micro_batches: Sequence[Batch], mesh: Mesh, device: torch.device) -> None:
        """Start counting, from this rank's own micro-batches; every rank has the same number of them."""
        self._num_micro_batches = len(micro_batches) * mesh.dp_size
        own_labels = float(sum(batch.num_labels for batch in micro_batches))
        # `full` and not `tensor`: it fills on the device; a copy from the host would wait for the GPU.
        count = torch.full((1,), own_labels, dtype=torch.float64, device=device)
        self._count = PendingSum(count, mesh.data_group) if mesh.dp_size > 1 else None
        self._mean_labels = None if self._count is not None else self._mean(count)

    def wait(self) -> torch.Tensor:
        """Masked tokens of a micro-batch on average over the step, fp64; 0 dimensions. On a CPU it may block."""
        if self._mean_labels is None:
            assert self._count is not None
            self._mean_labels = self._mean(self._count.wait())
        return self._mean_labels

    def weigh(self, losses: PretrainingLosses) -> PretrainingLosses:
        """The losses of a micro-batch, with its MLM loss multiplied by its weight; the total follows, with gradient.

        A micro-batch without masked tokens has weight 0, also if there is none in the whole step.
        """
        weight = (losses.num_labels / self.wait()).to(losses.mlm.dtype)
        mlm = weight * losses.mlm
        # In this order: without a contrastive loss the total is exactly the MLM loss.
        return losses._replace(total=mlm + (losses.total - losses.mlm), mlm=mlm)

    def _mean(self, count: torch.Tensor) -> torch.Tensor:
        return count[0].clamp(min=1) / self._num_micro_batches
