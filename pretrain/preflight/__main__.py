"""`taco preflight`: checks before a run, done in seconds; each problem names the machine and the remedy.

    taco preflight machine --config configs/taco_large.yaml                  # this machine, for people
    taco preflight plan | report | compare | all-reduce ...                  # the parts, for slurm/job.sh

The job script runs `plan` once, `report` on every node, `compare` on the reports, `all-reduce` on all ranks. Each
reports problems to people on standard error; standard output is for the script.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pretrain.cli import new_program, run_program

if TYPE_CHECKING:
    from pretrain.config.sections import RunConfig
    from pretrain.preflight.node_checks import NodeReport

app = new_program()

ConfigOption = Annotated[Path, typer.Option(help="YAML file that describes the run; configs/ holds examples")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, any number of them")]
ScratchOption = Annotated[bool, typer.Option("--from-scratch", help="an option of `taco train`; ignored here")]
AllowOption = Annotated[list[str] | None, typer.Option(help="key that may have changed since the run began")]
NodesOption = Annotated[str, typer.Option(help="names of all machines, separated by spaces, in the order of ranks")]


@app.callback(epilog="Example: taco preflight machine --config configs/taco_large.yaml")
def preflight() -> None:
    """Check machines, data and network before a run."""


@app.command("machine", epilog="Example: taco preflight machine --config configs/taco_large.yaml")
def machine(config: ConfigOption, overrides: Overrides = None, gpus: int | None = None) -> None:
    """Check this machine: GPUs, names, disk space, data; exit code 1 if something is wrong."""
    from pretrain.config.load import load_config

    node_report = _inspect(load_config(config, overrides or ()), gpus)
    typer.echo(f"{node_report.node}: address {node_report.address}, {_count_gpus(node_report.gpus)}")
    for name, value in {**node_report.versions, **node_report.data}.items():
        typer.echo(f"  {name}: {value}")
    for problem in node_report.problems:
        typer.echo(f"  problem: {problem}")
    if node_report.problems:
        raise typer.Exit(1)


@app.command("plan", epilog="Example: taco preflight plan --config configs/taco_large.yaml")
def plan(
    config: ConfigOption,
    overrides: Overrides = None,
    allow_change: AllowOption = None,
    from_scratch: ScratchOption = False,
    processes: Annotated[int | None, typer.Option(help="processes of the whole run")] = None,
) -> None:
    """Print `STEPS RUN_FOLDER/` if the run could start now.

    Exit code 2: it cannot start, and a retry would not help: the configuration does not fit, or another run holds the
    folder.
    """
    from pretrain.config.load import load_config
    from pretrain.run_folder import RunFolder

    resolved = load_config(config, overrides or (), world_size=processes)
    RunFolder(resolved.run.output_dir).check_free(resolved, allow_change or ())
    # The slash protects a newline at the end of a name from the shell, which would strip it.
    typer.echo(f"{resolved.train.steps} {resolved.run.output_dir.absolute()}/")


@app.command("report", epilog="Example: taco preflight report --config configs/taco_large.yaml")
def report(
    config: ConfigOption,
    overrides: Overrides = None,
    allow_change: AllowOption = None,
    from_scratch: ScratchOption = False,
    gpus: Annotated[int | None, typer.Option(help="processes on this machine, each with its own GPU")] = None,
) -> None:
    """Print a report on this machine, for `compare`."""
    from pretrain.config.load import load_config

    typer.echo("\n".join(_inspect(load_config(config, overrides or ()), gpus).to_lines()))


@app.command("compare", epilog="Example: taco preflight compare --nodes 'gpu1 gpu2' < reports")
def compare(nodes: NodesOption) -> None:
    """Read reports from standard input; print the machines that fail, separated by commas.

    Exit code 1: those machines fail. Exit code 2: all machines fail, so leaving some out would not help.
    """
    from pretrain.preflight.node_checks import NodeReport, find_failing

    reports = NodeReport.from_lines(sys.stdin)
    names = nodes.split()
    failing = find_failing(reports, names)
    for line in _describe_failing(failing, names):
        print(line, file=sys.stderr)
    if not failing:
        addresses = [f"{node_report.node} {node_report.address}" for node_report in reports]
        print(f"preflight: {len(names)} machines are well: {', '.join(addresses)}", file=sys.stderr)
        return
    if set(failing) >= set(names):
        raise typer.Exit(2)
    typer.echo(",".join(failing))
    raise typer.Exit(1)


@app.command("all-reduce", epilog="Example: torchrun -m pretrain.preflight all-reduce --config configs/taco_tiny.yaml")
def all_reduce(
    config: ConfigOption,
    overrides: Overrides = None,
    allow_change: AllowOption = None,
    from_scratch: ScratchOption = False,
    nodes: NodesOption = "",
    timeout: Annotated[float, typer.Option(help="seconds until missing ranks are named")] = 120.0,
) -> None:
    """Sum over all ranks; rank 0 prints the machines whose ranks are missing, separated by commas."""
    from pretrain.config.load import load_config
    from pretrain.parallel.launch import choose_device, read_launch
    from pretrain.preflight.all_reduce_check import MissingRanksError, check_all_reduce

    launch = read_launch()
    device = choose_device(load_config(config, overrides or ()).run.device, launch)
    try:
        result = check_all_reduce(launch, device, nodes.split(), timeout)
    except MissingRanksError as error:
        typer.echo(",".join(error.nodes))
        raise
    if launch.rank == 0:
        print(f"preflight: all-reduce over {result}", file=sys.stderr)


def _inspect(config: RunConfig, gpus: int | None) -> NodeReport:
    """This machine's report; the configuration says whether it needs GPUs, or the job if that leaves it open."""
    from pretrain.preflight.node_checks import inspect_machine

    device = config.run.device
    has_granted_gpus = any(os.environ.get(name) for name in ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE"))
    needs_gpus = device == "cuda" or (device == "auto" and (gpus is not None and has_granted_gpus))
    return inspect_machine(config, num_gpus=max(1, gpus or 1) if needs_gpus else 0)


def _describe_failing(failing: dict[str, list[str]], nodes: list[str]) -> list[str]:
    """One line per problem; a problem of all machines gets a single line."""
    shared = [text for text in next(iter(failing.values()), []) if all(text in failing.get(n, []) for n in nodes)]
    if len(nodes) < 2:
        shared = []
    lines = [f"preflight: all {len(nodes)} machines: {text}" for text in shared]
    for node, problems in failing.items():
        lines += [f"preflight: {node}: {text}" for text in problems if text not in shared]
    return lines


def _count_gpus(gpus: list[str]) -> str:
    return f"{len(gpus)} x {gpus[0]}" if gpus else "no GPU asked for"


if __name__ == "__main__":
    run_program(app, name="python -m pretrain.preflight")
