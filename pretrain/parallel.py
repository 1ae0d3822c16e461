"""Who this process is among the others: launch environment, process grid, small collectives.

The one place that reads the launcher's environment variables and makes process groups. It and `engine.py` import
DeepSpeed, it and `model/tensor_parallel.py` megatron-core; torch and both are imported inside the functions: a
configuration error must not wait for them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from pretrain.errors import ConfigError

if TYPE_CHECKING:
    import torch
    import torch.distributed as distributed

    from pretrain.config.sections import ParallelSection

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Launch:
    """What the launcher said: rank and size over all nodes, and on this one."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def read_launch(environment: Mapping[str, str] | None = None) -> Launch:
    """This process's place as torchrun (or any launcher that sets the same variables) gave it; alone without them.

    Raises:
        ConfigError: some of RANK, WORLD_SIZE, LOCAL_RANK are set and others are missing or no numbers.
    """
    variables = os.environ if environment is None else environment
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    present = [name for name in names if variables.get(name)]
    if not present:
        return Launch(rank=0, world_size=1, local_rank=0, local_world_size=1)
    if len(present) < len(names):
        missing = ", ".join(name for name in names if name not in present)
        raise ConfigError(f"environment: {', '.join(present)} set but {missing} missing; start with torchrun, or unset")
    try:
        rank, world_size, local_rank = (int(variables[name]) for name in names)
        local_world_size = int(variables.get("LOCAL_WORLD_SIZE", world_size))
    except ValueError as error:
        raise ConfigError(f"environment: RANK, WORLD_SIZE, LOCAL_RANK must be whole numbers: {error}") from None
    return Launch(rank, world_size, local_rank, local_world_size)


def choose_device(wanted: str, launch: Launch) -> torch.device:
    """The device of this rank.

    Raises:
        ConfigError: a GPU is asked for where there is none, or fewer than ranks on this node.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and count == 0):
        return torch.device("cpu")
    if count == 0:
        raise ConfigError(
            "run.device is cuda, but torch sees no GPU here "
            f"(torch {torch.__version__}, CUDA {torch.version.cuda or 'not built in'}); "
            "set run.device=cpu, or install a CUDA build of torch and check nvidia-smi"
        )
    if launch.local_rank >= count:
        raise ConfigError(
            f"local rank {launch.local_rank} has no GPU: this node shows {count}; start at most {count} ranks per node"
        )
    return torch.device("cuda", launch.local_rank)


def make_deterministic() -> None:
    """Have every kernel of a GPU give the same bits again from the same input; before the first of them.

    What has no such kernel raises. Memory is not filled beforehand: nothing here reads what it has not written.
    """
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def start_process_group(launch: Launch, device: torch.device, timeout: timedelta = COLLECTIVE_TIMEOUT) -> None:
    """Join the process group (gloo on CPU, NCCL on GPUs) and tell DeepSpeed about it; harmless when called again.

    `timeout`: after which a collective fails that not all ranks have joined.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if device.type == "cpu":
        # DeepSpeed chooses its accelerator while it is imported and would take a GPU that run.device=cpu leaves alone.
        os.environ["DS_ACCELERATOR"] = "cpu"
    import torch
    import torch.distributed as distributed

    if not distributed.is_initialized():
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        if launch.world_size == 1:
            # Alone there is nobody to meet: no port is opened, so two runs on one machine cannot collide.
            store = distributed.HashStore()
            distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        else:
            distributed.init_process_group(backend, timeout=timeout)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _start_deepspeed(launch)


def _start_deepspeed(launch: Launch) -> None:
    import logging
    import warnings

    # torch tells users of DeepSpeed, at every start, to rename calls that only DeepSpeed can rename.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*torch\.distributed\..* is deprecated")
    # DeepSpeed reads these names even when the process group is there already.
    os.environ.setdefault("RANK", str(launch.rank))
    os.environ.setdefault("WORLD_SIZE", str(launch.world_size))
    os.environ.setdefault("LOCAL_RANK", str(launch.local_rank))
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # The CPU shared-memory communicator is compiled at start-up under a lock file; a killed worker leaves the lock and
    # every later start waits for ever. gloo does the same job here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _load_muon()
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def _load_muon() -> None:
    """Import DeepSpeed's Muon, for which DeepSpeed asks at every start with ZeRO, without compiling it.

    `torch.compile` decorates its functions, and that alone loads TorchInductor: a fifth of every rank's start, and
    hundreds of files from a shared disk, for an optimizer that no run here has.
    """
    from deepspeed.runtime import compiler

    compile_functions = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = compile_functions


def stop_process_group() -> None:
    """Leave the process group, if there is one."""
    import torch.distributed as distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


# What gloo and NCCL say when the other side has gone, and not when they were called wrongly.
_LOST_CONTACT = (
    "gloo/transport/",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "ncclRemoteError",
    "communicator was aborted",
    "Timed out waiting",
    "ollective operation timeout",
)


def is_lost_contact(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank or the network has gone, and not by a mistake of the program."""
    import torch.distributed as distributed

    is_network = isinstance(error, distributed.DistNetworkError | distributed.DistStoreError)
    return is_network or any(words in str(error) for words in _LOST_CONTACT)


# -- the grid ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the grid of pipeline x data x tensor, and the groups that it talks in.

    Ranks count tensor fastest, then data, then pipeline, as megatron-core and DeepSpeed's topology both do: the ranks
    that talk most are neighbours. A group is None where it would have one member; `data_group` None means all ranks.
    """

    dp_rank: int
    dp_size: int
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    tensor_group: distributed.ProcessGroup | None = None
    data_group: distributed.ProcessGroup | None = None

    @property
    def mpu(self) -> Any:
        """What DeepSpeed asks about the grid when there is no pipeline; None where every rank holds the whole model."""
        return _ModelParallelUnit() if self.tp_size > 1 and self.pp_size == 1 else None


class _ModelParallelUnit:
    """megatron-core's `parallel_state` with the three names that DeepSpeed wants beside it.

    `initialize_sequence_parallel` must not be among them: DeepSpeed takes it for its own sequence parallelism.
    """

    def __getattr__(self, name: str) -> Any:
        from megatron.core import parallel_state

        if name == "initialize_sequence_parallel":
            raise AttributeError(name)
        return getattr(parallel_state, name)

    def get_model_parallel_rank(self) -> int:
        """This rank's number among those that hold one model together."""
        from megatron.core import parallel_state

        return parallel_state.get_tensor_model_parallel_rank()

    def get_model_parallel_world_size(self) -> int:
        """How many ranks hold one model together."""
        from megatron.core import parallel_state

        return parallel_state.get_tensor_model_parallel_world_size()

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of those that hold the same part of the model."""
        import torch.distributed as distributed
        from megatron.core import parallel_state

        return distributed.get_process_group_ranks(parallel_state.get_data_parallel_group())


def start_mesh(section: ParallelSection, device: torch.device) -> Mesh:
    """Cut the processes into the grid that `section` asks for; collective, after `start_process_group`.

    `check_world_size` has made sure that the sizes divide the number of processes.
    """
    if section.tensor * section.pipeline == 1:
        return Mesh(dp_rank=rank(), dp_size=world_size())
    import warnings

    import torch

    # Its optimizers and attention kernels, which we do not use, complain that optional packages are missing.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    from megatron.core import parallel_state

    if device.type == "cpu":
        # megatron-core asks CUDA where its buffers belong; without a GPU in use they belong to the CPU.
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
    )


# -- small collectives -------------------------------------------------------------------------------------------------


def rank() -> int:
    """This process's number over all nodes; 0 without a process group."""
    import torch.distributed as distributed

    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    import torch.distributed as distributed

    return distributed.get_world_size() if distributed.is_initialized() else 1


def start_side_group() -> distributed.ProcessGroup | None:
    """A second group of all ranks, on the CPU, for a thread beside training; None where there is one rank. Collective.

    Collectives of a group must come in the same order on all ranks, and two threads in one group would mix theirs.
    """
    import torch.distributed as distributed

    return distributed.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT) if world_size() > 1 else None


def gather_objects(value: T, group: distributed.ProcessGroup | None = None) -> list[T]:
    """Every rank's `value`, in rank order, on every rank (plain types only: they travel as bytes).

    Args:
        group: one of all ranks, from `start_side_group`; None: the one that training uses.
    """
    import torch.distributed as distributed

    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value, group=group)
    return values


def first_failure(problem: str | None, group: distributed.ProcessGroup | None = None) -> str | None:
    """The vote that ends every risky step: the first problem of any rank, the same answer on every rank."""
    problems = gather_objects(problem, group)
    return next((f"rank {i}: {text}" for i, text in enumerate(problems) if text is not None), None)


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The element-wise sum over all ranks, in place."""
    import torch.distributed as distributed

    if world_size() > 1:
        distributed.all_reduce(tensor)
    return tensor
