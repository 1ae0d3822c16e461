"""The process grid of tensor, pipeline and data parallelism, as megatron-core and DeepSpeed expect it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pretrain.parallel.collectives import rank, world_size

if TYPE_CHECKING:
    import torch
    import torch.distributed as distributed

    from pretrain.config.sections import ParallelSection


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the grid of pipeline x data x tensor, and the groups in which it communicates.

    The tensor rank varies fastest, then data, then pipeline, as in megatron-core and DeepSpeed's topology: the ranks
    that communicate most are neighbours. A group of one rank is None; `data_group` None means all ranks. `stage_group`,
    the ranks of this pipeline stage, is there where tensor parallelism is.
    """

    dp_rank: int
    dp_size: int
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    tensor_group: distributed.ProcessGroup | None = None
    data_group: distributed.ProcessGroup | None = None
    stage_group: distributed.ProcessGroup | None = None

    @property
    def mpu(self) -> Any:
        """What DeepSpeed asks about the grid without a pipeline; None if every rank holds the whole model."""
        return _ModelParallelUnit() if self.tp_size > 1 and self.pp_size == 1 else None


class _ModelParallelUnit:
    """megatron-core's `parallel_state` with the three methods that DeepSpeed needs besides.

    `initialize_sequence_parallel` must not be found here: DeepSpeed would take it for its own sequence parallelism.
    """

    def __getattr__(self, name: str) -> Any:
        from megatron.core import parallel_state

        if name == "initialize_sequence_parallel":
            raise AttributeError(name)
        return getattr(parallel_state, name)

    def get_model_parallel_rank(self) -> int:
        """This rank's number among the ranks that share one model."""
        from megatron.core import parallel_state

        return parallel_state.get_tensor_model_parallel_rank()

    def get_model_parallel_world_size(self) -> int:
        """How many ranks share one model."""
        from megatron.core import parallel_state

        return parallel_state.get_tensor_model_parallel_world_size()

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks that hold the same part of the model."""
        import torch.distributed as distributed
        from megatron.core import parallel_state

        return distributed.get_process_group_ranks(parallel_state.get_data_parallel_group())


def start_mesh(section: ParallelSection, device: torch.device) -> Mesh:
    """Arrange the processes in the grid that `section` describes; collective, after `start_process_group`.

    `check_world_size` has ensured that the sizes divide the number of processes.
    """
    if section.tensor * section.pipeline == 1:
        return Mesh(dp_rank=rank(), dp_size=world_size())
    import warnings

    import torch

    # megatron-core's optimizers and attention kernels, which we do not use, warn of missing optional packages.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    from megatron.core import parallel_state

    if device.type == "cpu":
        # megatron-core asks CUDA for the device of its buffers; without a GPU in use that is the CPU.
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    parallel_state.initialize_model_parallel(section.tensor, section.pipeline)
    return Mesh(
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=section.tensor,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=section.pipeline,
        tensor_group=parallel_state.get_tensor_model_parallel_group() if section.tensor > 1 else None,
        data_group=parallel_state.get_data_parallel_group(),
        stage_group=parallel_state.get_tensor_and_data_parallel_group() if section.tensor > 1 else None,
    )
