"""Trains `configs/taco_tiny.yaml` by the job script on a SLURM of several nodes while things break at random.

    python tests/soak/soak_train.py --seconds 600

First the job runs undisturbed, so many steps as `--seconds` of a disturbed job may allow. Then the same job again, and
until it is done something hits it every 20 seconds: killed, stopped and signalled ranks, all ranks at once, the signal
before the time limit, preemption, a node that loses power, a flipped bit in the newest checkpoint, a lost `latest`. In
the end every state file must be that of the undisturbed run. Prints a table with the goodput: the time of the steps
that count, each as long as the disturbed job's median step, over the time that this job held its nodes. Needs root and
SLURM (tests/slurm/local_slurm.sh install). A difference, or a job that ends otherwise, is exit code 1; the files stay.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
import textwrap
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

from job_faults import (  # noqa: E402
    AskedRank,
    Fault,
    FlippedBit,
    KilledRank,
    KilledRanks,
    LostLatest,
    PowerLoss,
    Preemption,
    StoppedRank,
    TimeLimitSignal,
)
from slurm_cluster import ENDED, Cluster, log_of, running_cluster  # noqa: E402
from soak_preprocess import SAMPLE, SoakError, tool  # noqa: E402

from pretrain.checkpoint.manifest import CheckpointManifest, find_checkpoint  # noqa: E402
from pretrain.errors import CheckpointError  # noqa: E402
from pretrain.metrics import read_metrics  # noqa: E402

SCRIPT = ROOT / "slurm" / "taco_large.sh"
FAULTS: dict[str, type[Fault]] = {
    "rank killed": KilledRank,
    "rank stopped (SIGSTOP), found by the watchdog": StoppedRank,
    "rank asked to stop (SIGTERM)": AskedRank,
    "all ranks killed": KilledRanks,
    "signal before the time limit": TimeLimitSignal,
    "preempted": Preemption,
    "node lost power": PowerLoss,
    "bit flipped in the newest checkpoint": FlippedBit,
    "`latest` emptied": LostLatest,
}
NUM_NODES, RANKS = 3, 2
HEAL_SECONDS = 20.0
PROBE_STEPS = 150
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- begin of the training soak -->", "<!-- end of the training soak -->"


@dataclass
class Tally:
    """What a soak did; seconds are of the wall clock."""

    steps: int = 0
    step_seconds: float = 0.0
    allocated_seconds: float = 0.0
    waiting_seconds: float = 0.0
    restarts: int = 0
    steps_done_again: int = 0
    faults: dict[str, int] = field(default_factory=dict)

    @property
    def goodput(self) -> float:
        """Share of the allocated time that went into the steps that count."""
        return self.step_seconds / max(self.allocated_seconds, 1e-9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600, help="that the disturbed job is meant to take, about")
    parser.add_argument("--every", type=float, default=20, help="mean seconds between faults")
    parser.add_argument("--steps", type=int, help="of the run, instead of what --seconds allow")
    parser.add_argument("--faults", nargs="+", choices=range(len(FAULTS)), type=int, help="only these, by number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="taco-soak-"))
    tally = soak(folder, arguments)
    shutil.rmtree(folder)
    if arguments.write:
        write_page(tally, arguments)
    print(json.dumps(asdict(tally) | {"goodput": tally.goodput}) if arguments.json else table(tally))


def soak(folder: Path, arguments: argparse.Namespace) -> Tally:
    """The undisturbed and the disturbed job; raises SoakError, leaving `folder`."""
    make_data(folder)
    names = list(FAULTS)
    kinds = [FAULTS[names[number]] for number in arguments.faults] if arguments.faults else list(FAULTS.values())
    settings = {"LOCAL_SLURM_GRACE": "40", "LOCAL_SLURM_KILLWAIT": "10"}
    with running_cluster(folder / "cluster", NUM_NODES, "soak", **settings) as cluster:
        steps = arguments.steps or affordable_steps(cluster, folder, arguments.seconds, arguments.every)
        tally = Tally(steps)
        clean = Job(cluster, folder / "undisturbed", steps)
        clean.wait()
        job = Job(cluster, folder / "disturbed", steps)
        disturb(job, random.Random(arguments.seed), kinds, arguments.every, tally)
        compare(clean, job)
        return tally


def make_data(folder: Path) -> None:
    """A vocabulary and datasets of the sample corpus, as `make quickstart` makes them."""
    vocab = folder / "vocab.txt"
    run(*tool("train-tokenizer", "--input", SAMPLE, "--output", vocab, "--vocab-size", 4000))
    for name, part in (("train", "0:0.95"), ("validation", "0.95:1")):
        words = ["--input", SAMPLE, "--tokenizer", vocab, "--output-prefix", folder / name, "--hash-range", part]
        run(*tool("preprocess", *words))


def run(*command: str) -> None:
    import subprocess

    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise SoakError(f"{' '.join(command)}: {done.stderr[-500:]}")


def affordable_steps(cluster: Cluster, folder: Path, seconds: float, every: float) -> int:
    """Steps of which the disturbed job takes about `seconds`, by what a start and a step of this machine take.

    Between two faults, which come at random, T seconds pass, of which max(0, T - start) go into steps: on average the
    share exp(-start / every).
    """
    probe = Job(cluster, folder / "probe", PROBE_STEPS)
    probe.wait()
    per_step = seconds_per_step(probe.run)
    start = max(0.0, probe.seconds_on_nodes() - PROBE_STEPS * per_step)
    return max(PROBE_STEPS, round(math.exp(-start / every) * seconds / per_step))


def seconds_per_step(run: Path) -> float:
    """By its own throughput, validation and saves left out: the median of what it logged."""
    rates = sorted(record["tokens_per_second"] for record in read_metrics(run) if "tokens_per_second" in record)
    tree = yaml.safe_load((run / "config.yaml").read_text())
    return float(tree["train"]["global_batch_size"] * tree["data"]["seq_length"] / rates[len(rates) // 2])


class Job:
    """A submitted job on a folder of its own."""

    def __init__(self, cluster: Cluster, folder: Path, steps: int) -> None:
        folder.mkdir()
        self.cluster, self.folder, self.run = cluster, folder, folder / "run"
        self.config = folder / "config.yaml"
        self.config.write_text(yaml.safe_dump(configuration(folder, steps)))
        self.number = cluster.submit(
            folder, SCRIPT, options=("--nodes=2",), TACO_CONFIG=str(self.config), TACO_PROCESSES_PER_NODE="1",
            TACO_PREFLIGHT="off", TACO_MAX_FAILURES="1000", TACO_MAX_RESTARTS="10000",
        )  # fmt: skip

    @property
    def state(self) -> str:
        """SLURM's word."""
        return self.cluster.show(self.number, "JobState")

    def wait(self, timeout: float = 3600) -> None:
        """Until it is done."""
        if self.cluster.wait(self.number, self.folder, timeout=timeout) != "COMPLETED":
            raise SoakError(f"{self.folder}: ended {self.state}: {log_of(self.folder, self.number)[-2000:]}")

    def seconds_on_nodes(self) -> float:
        """How long it ran, as SLURM knows it."""
        begin, end = (datetime.fromisoformat(self.cluster.show(self.number, name)) for name in ("StartTime", "EndTime"))
        return (end - begin).total_seconds()

    def state_files(self) -> dict[str, str]:
        """Hashes of the state files of the newest checkpoint."""
        manifest = CheckpointManifest.load(find_checkpoint(self.run))
        files = {record.name: record.xxh3_128 for record in manifest.files if record.name.startswith("state/")}
        return files | {"step": str(manifest.step)}


def configuration(folder: Path, steps: int) -> dict[str, object]:
    """`configs/taco_tiny.yaml` for two ranks of a processor, saving often, and impatient with a rank that hangs."""
    return {
        "extends": str(ROOT / "configs" / "taco_tiny.yaml"),
        "run": {"output_dir": str(folder / "run"), "device": "cpu", "tensorboard": False},
        "data": {name: [str(folder.parent / name)] for name in ("train", "validation")},
        "train": {"steps": steps, "eval_every": steps, "log_every": 5},
        "optim": {"warmup_steps": min(100, steps // 4)},
        "checkpoint": {"every_steps": 10, "keep": 3},
        "watchdog": {"start_seconds": 60.0, "step_seconds": 5.0, "checkpoint_seconds": 20.0, "heartbeat_seconds": 0.5},
    }


def disturb(job: Job, random_: random.Random, kinds: list[type[Fault]], every: float, tally: Tally) -> None:
    """Faults at random moments, on average one in `every` seconds that the job holds its nodes, until it is done."""
    faults: Counter[str] = Counter()
    broken: list[tuple[float, Fault]] = []
    next_fault, last = random_.expovariate(1 / every), time.monotonic()
    while (state := job.state) not in ENDED:
        now = time.monotonic()
        passed, last = now - last, now
        if state == "RUNNING":
            tally.allocated_seconds += passed
        else:
            tally.waiting_seconds += passed
        if state == "RUNNING" and tally.allocated_seconds >= next_fault:
            fault = inject_one(job, kinds, random_)
            if fault is not None:
                next_fault += random_.expovariate(1 / every)
                faults[next(name for name, kind in FAULTS.items() if type(fault) is kind)] += 1
                broken += [(now, fault)] if isinstance(fault, PowerLoss) else []
        while broken and now - broken[0][0] > HEAL_SECONDS:
            broken.pop(0)[1].heal(job.cluster)
        time.sleep(0.1)
    for _, fault in broken:
        fault.heal(job.cluster)
    job.wait()
    tally.faults = dict(faults)
    tally.restarts = int(job.cluster.show(job.number, "Restarts"))
    tally.steps_done_again = steps_done_again(job)
    # By its own steps: other work on the machine would make another run's longer or shorter.
    tally.step_seconds = seconds_per_step(job.run) * tally.steps


def inject_one(job: Job, kinds: list[type[Fault]], random_: random.Random) -> Fault | None:
    """The first, in random order, that finds something to hit: between two starts of the job there are no ranks."""
    for kind in random_.sample(kinds, len(kinds)):
        fault = kind()
        try:
            if fault.inject(job.cluster, job.number, job.config, random_):
                return fault
        except (AssertionError, StopIteration, OSError):  # the job has just ended, or is starting
            continue
    return None


def steps_done_again(job: Job) -> int:
    """Sum, over all restarts, of the steps that had been logged and were not in the checkpoint that went on."""
    again, last = 0, 0
    for line in log_of(job.folder, job.number).splitlines():
        if line.startswith("0: ") or " 0: " in line[:4]:
            if found := re.search(r"step +(\d+)/", line):
                last = int(found[1])
            elif found := re.search(r"continuing from .*step-(\d+)", line):
                again += max(0, last - int(found[1]))
                last = int(found[1])
    return again


def compare(clean: Job, job: Job) -> None:
    """Every state file, to the bit."""
    try:
        expected, found = clean.state_files(), job.state_files()
    except CheckpointError as error:
        raise SoakError(str(error)) from None
    different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if different:
        raise SoakError(f"{job.folder}: differs from the undisturbed run in {', '.join(different)}")


def rows(tally: Tally) -> dict[str, str]:
    """What people want to know, in words."""
    lost = tally.steps_done_again / max(tally.steps, 1)
    return {
        "steps, all final state files as in an undisturbed run": f"{tally.steps:,}",
        **{name: str(count) for name, count in sorted(tally.faults.items())},
        "faults in total": str(sum(tally.faults.values())),
        "restarts": str(tally.restarts),
        "steps logged and repeated": f"{tally.steps_done_again:,} ({lost:.1%} of the run)",
        "seconds on the nodes": f"{tally.allocated_seconds:,.0f} (and {tally.waiting_seconds:,.0f} in the queue)",
        "seconds of the steps alone": f"{tally.step_seconds:,.0f}",
        "goodput": f"{tally.goodput:.1%}",
    }


def table(tally: Tally) -> str:
    return "\n".join(f"{name:52} {value}" for name, value in rows(tally).items())


def write_page(tally: Tally, arguments: argparse.Namespace) -> None:
    """Between two marks of the page."""
    text = PAGE.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise SoakError(f"{PAGE}: the lines {BEGIN} and {END} are missing; put them where the table belongs")
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    intro = (
        f"`python tests/soak/soak_train.py --seconds {arguments.seconds:.0f} --write`, a fault every "
        f"{arguments.every:.0f} seconds on average, two ranks on two nodes:"
    )
    body = "\n".join(f"| {name} | {value} |" for name, value in rows(tally).items())
    PAGE.write_text(
        f"{head}{BEGIN}\n{textwrap.fill(intro, 127)}\n\n| | |\n|---|---|\n{body}\n{END}{tail}", encoding="utf-8"
    )


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH", str(ROOT))
    try:
        main()
    except SoakError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
