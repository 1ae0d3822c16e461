"""A real SLURM of several nodes on this machine for one test module, and jobs on it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from project import ROOT

LOCAL_SLURM = ROOT / "tests" / "slurm" / "local_slurm.sh"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT"}


class Cluster:
    """What talks to a running cluster; `log_dir` of each job holds its output."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment

    def call(self, *words: object, check: bool = True) -> str:
        """Standard output of one of SLURM's programs, or of local_slurm.sh."""
        command = [str(word) for word in words]
        done = subprocess.run(
            command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(
        self,
        folder: Path,
        script: Path,
        *arguments: str,
        options: tuple[str, ...] = ("--nodes=2",),
        **settings: str,
    ) -> str:
        """Submit `script` from the project's root; output goes to `folder`/JOB.log. The job's number."""
        settings = {"TACO_PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **settings}
        command = ["sbatch", "--parsable", f"--output={folder}/%j.log", *options, str(script), *arguments]
        done = subprocess.run(
            command,
            env={**self.environment, **settings},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def show(self, job: str, field: str) -> str:
        """One field of `scontrol show job`."""
        record = self.call("scontrol", "-o", "show", "job", job)
        found = re.search(rf"\b{field}=(\S*)", record)
        assert found, record
        return found[1]

    def wait(self, job: str, folder: Path, *, timeout: float = 200) -> str:
        """The state in which a job ends."""
        self.wait_until(lambda: self.show(job, "JobState") in ENDED, job, folder, timeout=timeout)
        return self.show(job, "JobState")

    def wait_until(self, is_so: Callable[[], object], job: str, folder: Path, *, timeout: float = 90) -> None:
        """Look every 50 ms until `is_so`; the job's output is in the failure."""
        end = time.monotonic() + timeout
        while not is_so():
            assert time.monotonic() < end, f"job {job}: {self.show(job, 'JobState')}\n{log_of(folder, job)}"
            time.sleep(0.05)


def log_of(folder: Path, job: str) -> str:
    """What a job has printed so far, over all its starts."""
    path = folder / f"{job}.log"
    return path.read_text(errors="replace") if path.exists() else ""


@contextmanager
def running_cluster(folder: Path, num_nodes: int, prefix: str = "taco", **settings: str) -> Iterator[Cluster]:
    """A cluster whose files lie in `folder`; the test is skipped, with the reason, where there can be none."""
    if os.geteuid() != 0:
        pytest.skip("a local SLURM cluster needs root")
    if shutil.which("slurmctld", path="/usr/sbin:/usr/bin") is None:
        pytest.skip("SLURM is not installed; tests/slurm/local_slurm.sh install")
    environment = {**os.environ, "LOCAL_SLURM_DIR": str(folder), "LOCAL_SLURM_PREFIX": prefix, **settings}
    command = [LOCAL_SLURM, "up", str(num_nodes)]
    up = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    try:
        if up.returncode:
            pytest.skip(f"no local SLURM cluster here: {up.stderr.strip()[-300:]}")
        answer = subprocess.run([LOCAL_SLURM, "env"], env=environment, capture_output=True, text=True, check=True)
        command = ["bash", "-c", f"{answer.stdout}\nenv -0"]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        yield Cluster(dict(line.split("=", 1) for line in found.stdout.split("\0") if "=" in line))
    finally:
        subprocess.run([LOCAL_SLURM, "down"], env=environment, capture_output=True, timeout=120, check=False)
