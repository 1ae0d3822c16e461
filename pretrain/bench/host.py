"""`taco bench host`: what a training step costs the host of each rank, for worlds of any size, on one CPU.

Each world is a process of its own with pretended ranks (`host_cost.py`): the losses mean nothing, and collectives take
no time. What remains is the host's work: Python, and the operations that it queues.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pretrain.bench.contest import ONE_CORE, Runs, machine, medians, publish, run_contest
from pretrain.cli import new_program, run_program

app = new_program()


@app.command(epilog="Example: taco bench host --world 1 --world 64 --stage 1 --json")
def host(
    world: Annotated[
        list[int] | None, typer.Option(min=1, help="data-parallel ranks, repeatable; default 1 8 64")
    ] = None,
    stage: Annotated[list[int] | None, typer.Option(min=0, max=3, help="ZeRO stage, repeatable; default 1")] = None,
    num_layers: Annotated[int, typer.Option(min=1)] = 12,
    hidden_size: Annotated[int, typer.Option(min=64, help="few, so that the host's work shows")] = 64,
    micro_batches: Annotated[int, typer.Option(min=1, help="of a rank per step")] = 1,
    settings: Annotated[list[str] | None, typer.Option("--set", help="section.key=value, repeatable")] = None,
    steps: Annotated[int, typer.Option(min=1, help="timed steps per process, after a warm-up")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="processes per world and stage")] = 2,
    out: Annotated[Path | None, typer.Option(help="also write the JSON here")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable output")] = False,
    contender: Annotated[str | None, typer.Option(hidden=True, help="measure this one in this process")] = None,
) -> None:
    """Measure operations, waits and milliseconds of the host in one step, with any number of pretended ranks."""
    if contender is not None:
        stage_number, ranks = map(int, contender.split("/"))
        chosen = (f"zero.stage={stage_number}", *(settings or ()))
        typer.echo(json.dumps(_measure(ranks, num_layers, hidden_size, chosen, steps, micro_batches)))
        return
    contenders = [f"{number}/{ranks}" for number in stage or [1] for ranks in world or [1, 8, 64]]
    arguments = [f"--num-layers={num_layers}", f"--hidden-size={hidden_size}", f"--steps={steps}"]
    arguments += [f"--micro-batches={micro_batches}", *(f"--set={setting}" for setting in settings or ())]
    runs = run_contest("pretrain.bench.host", contenders, arguments, rounds, {**ONE_CORE, "DS_ACCELERATOR": "cpu"})
    report = _summarise(runs)
    publish(report, _table(report), out, as_json=as_json)


def _measure(
    world: int, num_layers: int, hidden_size: int, settings: tuple[str, ...], steps: int, micro_batches: int
) -> dict[str, Any]:
    import torch

    from pretrain.bench.host_cost import measure_host
    from pretrain.bench.step_contenders import Shape

    torch.set_num_threads(1)
    shape = Shape(2, 16, num_layers, hidden_size, num_negatives=2, dropout=0.0, settings=settings)
    return measure_host(shape, world, steps=steps, num_micro_batches=micro_batches).as_dict()


def _summarise(runs: Runs) -> dict[str, Any]:
    first = next(iter(runs.values()))[0]
    return {
        "benchmark": "host",
        "machine": machine(),
        "versions": first["versions"],
        "parameters": first["num_parameters"],
        "milliseconds": medians(runs, "milliseconds"),
        "operations": {name: answers[0]["operations"] for name, answers in runs.items()},
        "outside": {name: answers[0]["outside"] for name, answers in runs.items()},
        "reads": {name: answers[0]["reads"] for name, answers in runs.items()},
        "runs": runs,
    }


def _table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['parameters']} parameters; operations without views",
        f"{'ZeRO/ranks':>12} {'ms':>8} {'operations':>11} {'outside the model':>18} {'reads':>6}",
    ]
    for name, milliseconds in report["milliseconds"].items():
        operations, outside = sum(report["operations"][name].values()), report["outside"][name]
        lines.append(f"{name:>12} {milliseconds:8.1f} {operations:11,} {outside:18,} {report['reads'][name]:6}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(app, name="python -m pretrain.bench.host")
