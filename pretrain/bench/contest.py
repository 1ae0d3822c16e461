"""What every benchmark shares: contenders in separate processes, interleaved, and a report of their medians and spread.

A noisy machine is then noisy for all of them. Figures are CPU seconds (user + system) if a contender should use one
core, since other work on the machine stretches wall-clock time; only ratios within one run count.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import typer

from pretrain.errors import TacoError
from pretrain.runlog import progress_bar

Runs = dict[str, list[dict[str, Any]]]


# Keeps every library on one core and off the network.
ONE_CORE = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def run_contest(
    module: str,
    contenders: Sequence[str],
    arguments: Sequence[str],
    rounds: int,
    environment: Mapping[str, str] | None = None,
) -> Runs:
    """Every contender's answer in each of `rounds` rounds, from one process `python -m MODULE --contender NAME` each.

    `environment` adds variables (ONE_CORE). A contender prints its answer, one JSON object, as the last line of
    standard output.

    Raises:
        TacoError: a contender failed; holds the end of its standard error.
    """
    runs: Runs = {name: [] for name in contenders}
    settings = {**os.environ, **(environment or {})}
    with progress_bar("measuring", 0, rounds * len(contenders), is_shown=True) as bar:
        for number in range(rounds * len(contenders)):
            name = contenders[number % len(contenders)]
            command = [sys.executable, "-m", module, "--contender", name, *arguments]
            answer = subprocess.run(command, capture_output=True, text=True, check=False, env=settings)
            if answer.returncode:
                raise TacoError(f"bench: {name} failed with exit code {answer.returncode}:\n{answer.stderr[-2000:]}")
            runs[name].append(json.loads(answer.stdout.splitlines()[-1]))
            bar.update(number + 1)
    return runs


def medians(runs: Runs, key: str) -> dict[str, float]:
    """The median of `key` over the rounds of every contender that answered with it."""
    return {name: median(run[key] for run in answers) for name, answers in runs.items() if key in answers[0]}


@dataclass(frozen=True)
class Spread:
    """The median of some values and their quartiles, between which the middle half lies."""

    median: float
    lower: float
    upper: float

    def as_dict(self) -> dict[str, float]:
        """The same in JSON types."""
        return {"median": self.median, "lower": self.lower, "upper": self.upper}


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    lower, middle, upper = quantiles(values, n=4, method="inclusive")
    return Spread(middle, lower, upper)


def spreads(runs: Runs, key: str, factor: float = 1.0) -> dict[str, dict[str, float]]:
    """Median and quartiles of `factor` times `key` over the rounds of every contender that answered with it."""
    found = {name: [factor * run[key] for run in answers] for name, answers in runs.items() if key in answers[0]}
    return {name: spread(values).as_dict() for name, values in found.items()}


def show_quartiles(found: dict[str, float], digits: int = 1) -> str:
    """The quartiles for a table: 3.7 to 4.1."""
    return f"{found['lower']:,.{digits}f} to {found['upper']:,.{digits}f}"


def cpu_seconds() -> float:
    """User and system time of this process, all its threads, and of its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def peak_bytes() -> int:
    """The largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # the other figure starts at the parent's
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def seconds_per_call(action: Callable[[int], object], min_seconds: float) -> float:
    """CPU seconds of one `action(number)`, number = 0, 1, ..., repeated for at least `min_seconds` after one call."""
    action(0)
    number, start, used = 0, time.process_time(), 0.0
    while number == 0 or used < min_seconds:
        number += 1
        action(number)
        used = time.process_time() - start
    return used / number


def machine() -> dict[str, str | int]:
    """Processor, cores that this process may use, and Python's version."""
    return {"processor": _processor(), "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}


def versions(*names: str) -> dict[str, str]:
    """Installed versions of distributions."""
    from importlib.metadata import version

    return {name: version(name) for name in names}


def publish(report: dict[str, Any], table: str, out: Path | None, *, as_json: bool) -> None:
    """Prints the report as JSON or as `table`, and writes the JSON to `out` if that is given."""
    text = json.dumps(report, indent=1)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")
    typer.echo(text if as_json else table)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    family = f" (family {facts['cpu family']})" if "cpu family" in facts else ""
    return facts["model name"] + family
