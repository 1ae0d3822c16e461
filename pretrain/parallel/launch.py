"""Starts one process of a run: the launcher's environment, the device, and the process group until its end.

The one place that reads the launcher's environment variables. torch and DeepSpeed are imported inside the functions: a
configuration error must not wait for them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from pretrain.errors import ConfigError
from pretrain.parallel.collectives import COLLECTIVE_TIMEOUT
from pretrain.parallel.meeting import Party, check_interfaces, meet, read_address
from pretrain.runlog import get_logger

if TYPE_CHECKING:
    import torch

log = get_logger(__name__)


@dataclass(frozen=True)
class Launch:
    """What the launcher set: rank and number of processes, over all nodes and on this one."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def read_launch(environment: Mapping[str, str] | None = None) -> Launch:
    """This process's place as set by torchrun (or a launcher with the same variables); a single process without them.

    Raises:
        ConfigError: some of RANK, WORLD_SIZE, LOCAL_RANK are set and others are missing, one is not an integer, or they
            do not fit together; or another launcher has started several processes that would each be a run of its own.
    """
    variables = os.environ if environment is None else environment
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    present = [name for name in names if variables.get(name)]
    if not present:
        _refuse_other_launchers(variables)
        return Launch(rank=0, world_size=1, local_rank=0, local_world_size=1)
    if len(present) < len(names):
        missing = ", ".join(name for name in names if name not in present)
        raise ConfigError(
            f"environment: {', '.join(present)} set but {missing} missing; start with `taco train --processes N` or "
            f"torchrun, or unset {', '.join(present)}"
        )
    try:
        rank, world_size, local_rank = (int(variables[name]) for name in names)
        local_world_size = int(variables.get("LOCAL_WORLD_SIZE", world_size))
    except ValueError as error:
        raise ConfigError(f"environment: RANK, WORLD_SIZE, LOCAL_RANK must be whole numbers: {error}") from None
    if not (0 <= rank < world_size and 0 <= local_rank < local_world_size <= world_size):
        raise ConfigError(
            f"environment: RANK={rank}, WORLD_SIZE={world_size}, LOCAL_RANK={local_rank}, LOCAL_WORLD_SIZE="
            f"{local_world_size} do not fit together; ranks count from 0; set all four, or start with torchrun"
        )
    return Launch(rank, world_size, local_rank, local_world_size)


# How launchers that set none of torchrun's variables say how many processes they have started. srun sets its own only
# for the tasks of a step, not in the shell of a job.
_OTHER_LAUNCHERS = (
    ("SLURM_STEP_NUM_TASKS", "srun"),
    ("OMPI_COMM_WORLD_SIZE", "mpirun"),
    ("PMI_SIZE", "mpiexec"),
    ("MV2_COMM_WORLD_SIZE", "mpirun"),
)


def _refuse_other_launchers(variables: Mapping[str, str]) -> None:
    """Processes that do not know their ranks would each be rank 0 of a run in the same folder."""
    for name, launcher in _OTHER_LAUNCHERS:
        count = variables.get(name, "")
        if count.isdigit() and int(count) > 1:
            raise ConfigError(
                f"environment: {launcher} has started {count} processes ({name}), but RANK, WORLD_SIZE and LOCAL_RANK "
                "are missing, so each of them would be a run of its own; start one process per node with "
                "`taco train --processes N`, or under SLURM use slurm/task.sh, which sets them"
            )


def warn_of_idle_tasks(launch: Launch, environment: Mapping[str, str] | None = None) -> None:
    """Say so where a job has room for several ranks, but its script has started this one process, without srun."""
    variables = os.environ if environment is None else environment
    tasks = variables.get("SLURM_NTASKS", "")
    if launch.world_size == 1 and not variables.get("SLURM_STEP_NUM_TASKS") and tasks.isdigit() and int(tasks) > 1:
        log.warning(
            "this job has %s tasks (SLURM_NTASKS), but this is one process alone: start ranks with --processes on one "
            "node, with `srun --ntasks-per-node=1 taco train --processes N` on several, or submit slurm/*.sh",
            tasks,
        )


def choose_device(requested_device: str, launch: Launch) -> torch.device:
    """The device of this rank.

    Raises:
        ConfigError: a GPU is requested but there is none, or this node has fewer GPUs than ranks.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if requested_device == "cpu" or (requested_device == "auto" and count == 0):
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
    """Make every GPU kernel repeat the same bits from the same input; call this before the first kernel.

    Operations without such a kernel raise. Memory is not filled beforehand: nothing here reads it before writing it.
    """
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def start_process_group(launch: Launch, device: torch.device, timeout: timedelta = COLLECTIVE_TIMEOUT) -> None:
    """Join the process group (gloo on CPU, NCCL on GPUs) and tell DeepSpeed about it; harmless when called again.

    `timeout`: a collective that not all ranks have joined by then fails, and so does the start.

    Raises:
        ConfigError: the environment names no meeting point, or a network interface that is not there.
        MeetingError: the ranks have not met.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if device.type == "cpu":
        # DeepSpeed chooses its accelerator when it is imported, and would take a GPU despite run.device=cpu.
        os.environ["DS_ACCELERATOR"] = "cpu"
    import torch
    import torch.distributed as distributed

    if not distributed.is_initialized():
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        if launch.world_size == 1:
            # A single process has no peers: it opens no port, so two runs on one machine cannot collide.
            distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
        else:
            check_interfaces(use_nccl=device.type == "cuda")
            store = meet(_party(launch), timeout)
            distributed.init_process_group(
                backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout
            )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _start_deepspeed(launch)


def _party(launch: Launch) -> Party:
    """All ranks of a run. Under torchrun, or `taco train --processes`, the launcher holds the store."""
    address, port = read_address()
    return Party(
        noun="rank",
        index=launch.rank,
        size=launch.world_size,
        address=address,
        port=port,
        is_host=launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        # Of the ranks that have no contact, one on each machine says so.
        speaks=launch.local_rank == 0 or launch.rank == 1,
        round=os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def _start_deepspeed(launch: Launch) -> None:
    import logging
    import warnings

    # At every start torch asks users of DeepSpeed to rename calls that only DeepSpeed can rename.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*torch\.distributed\..* is deprecated")
    # DeepSpeed reads these variables even if the process group exists already.
    os.environ.setdefault("RANK", str(launch.rank))
    os.environ.setdefault("WORLD_SIZE", str(launch.world_size))
    os.environ.setdefault("LOCAL_RANK", str(launch.local_rank))
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # The CPU shared-memory communicator is compiled at start-up under a lock file; a killed worker leaves the lock, and
    # every later start waits forever. gloo does the same job here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _load_muon()
    _keep_dynamo_out()
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def _load_muon() -> None:
    """Import DeepSpeed's Muon, which DeepSpeed needs at every start with ZeRO, without compiling it.

    `torch.compile` decorates its functions, and that alone loads TorchInductor: a fifth of every rank's start, and
    hundreds of files from a shared disk, for an optimizer that no run here uses.
    """
    from deepspeed.runtime import compiler

    compile_functions = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = compile_functions


def _keep_dynamo_out() -> None:
    """Let torch's optimizers work without loading TorchDynamo.

    Some of their methods are never compiled, but loading the compiler to say so takes as long as loading torch: half of
    a rank's start. After its first call, each method keeps the function that it calls from then on; here it is preset.
    """
    from torch.optim import Optimizer

    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        function = getattr(getattr(Optimizer, name), "__wrapped__", None)
        if function is not None and not hasattr(function, "__dynamo_disable"):
            setattr(function, "__dynamo_disable", function)  # noqa: B010  # an attribute of this name would be mangled


def stop_process_group() -> None:
    """Leave the process group, if there is one."""
    import torch.distributed as distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


# What gloo and NCCL say when the peer is gone, but not when they were called wrongly.
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
    """Whether a collective failed because another rank or the network is gone, and not because of a bug."""
    import torch.distributed as distributed

    is_network = isinstance(error, distributed.DistNetworkError | distributed.DistStoreError)
    return is_network or any(words in str(error) for words in _LOST_CONTACT)
