"""The launch environment, the choice of a device, and dropout as a function of the micro-batch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pretrain.errors import ConfigError
from pretrain.parallel import collectives
from pretrain.parallel.launch import Launch, choose_device, read_launch, warn_of_idle_tasks


def test_alone_without_a_launcher() -> None:
    assert read_launch({}) == Launch(0, 1, 0, 1)


def test_torchrun_variables() -> None:
    variables = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert read_launch(variables) == Launch(5, 8, 1, 4)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, LOCAL_RANK missing"),
        ({"RANK": "zero", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "must be whole numbers"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "do not fit together"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}, "mpirun has started 4 processes"),
        ({"PMI_SIZE": "2"}, "each of them would be a run of its own"),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}, "taco train --processes N"),
    ],
)
def test_an_environment_that_names_no_rank_is_refused(variables: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_launch(variables)


def test_a_job_of_several_tasks_with_one_process_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
    assert read_launch(job) == Launch(0, 1, 0, 1)
    warn_of_idle_tasks(Launch(0, 1, 0, 1), job)
    warn_of_idle_tasks(Launch(0, 1, 0, 1), job | {"SLURM_STEP_NUM_TASKS": "1"})
    (record,) = caplog.records
    assert "this job has 4 tasks" in record.getMessage()


def test_a_gpu_asked_for_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="set run.device=cpu"):
        choose_device("cuda", Launch(0, 1, 0, 1))
    assert choose_device("auto", Launch(0, 1, 0, 1)).type == "cpu"


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="start at most 1 ranks per node"):
        choose_device("auto", Launch(1, 2, 1, 2))


def test_collectives_without_a_process_group() -> None:
    assert collectives.gather_objects("x") == ["x"]
    assert collectives.first_failure(None) is None
    assert collectives.first_failure("disk full") == "rank 0: disk full"


@pytest.mark.slow
def test_deepspeeds_muon_is_loaded_without_torch_inductor() -> None:
    """By the module that DeepSpeed asks for at every start with ZeRO; what compiles afterwards compiles."""
    program = (
        "import sys; from pretrain.parallel import launch; launch._load_muon(); "
        "from deepspeed.runtime import compiler; "
        "from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam; "
        "print([name for name in sys.modules if name == 'torch._inductor.compile_fx'], compiler.compile.__module__)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert found.splitlines()[-1] == "[] deepspeed.runtime.compiler"
