"""`taco bench optimizer`: one optimizer step over all parameters of a BERT, ours against torch's and DeepSpeed's.

Every contender does what a step under ZeRO does with the reduced gradients: norm, clipping, update of fp32 weights and
moments, and the copy in the model's precision. They run in processes of their own, interleaved:

    adamw            ours: one norm, and one pass of C++ (CPU) or Triton (GPU) per flat buffer
    adamw-torch      torch's norm, product, fused AdamW and copy, over the same flat buffers
    adamw-deepspeed  the same with DeepSpeed's kernels (CPUAdam or FusedAdam), which must be built: not in the default
    lamb             ours, with a table of segments in flat buffers
    lamb-loop        LAMB parameter by parameter, as published code does it
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pretrain.bench.contest import Runs, machine, publish, run_contest, spread, versions
from pretrain.cli import new_program, run_program
from pretrain.errors import ConfigError

app = new_program()

CONTENDERS = ("adamw", "adamw-torch", "adamw-deepspeed", "lamb", "lamb-loop")
PEERS = {"adamw": ("adamw-torch", "adamw-deepspeed"), "lamb": ("lamb-loop",)}


@app.command(epilog="Example: taco bench optimizer --threads 1 --precision bf16 --json")
def optimizer(
    num_layers: Annotated[int, typer.Option(min=1)] = 4,
    hidden_size: Annotated[int, typer.Option(min=16, help="feed-forward 4 times as wide")] = 512,
    vocab_size: Annotated[int, typer.Option(min=1)] = 30_522,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="of gradients and model weights")] = "fp32",
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="where the state is")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="torch threads of every contender")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="timed steps per process, after two others")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="processes per contender")] = 3,
    only: Annotated[list[str] | None, typer.Option(help="a contender; default: all but adamw-deepspeed")] = None,
    out: Annotated[Path | None, typer.Option(help="also write the JSON here")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable output")] = False,
    contender: Annotated[str | None, typer.Option(hidden=True, help="measure this one in this process")] = None,
) -> None:
    """Measure the time of an optimizer step against torch's fused AdamW and a LAMB written as a loop."""
    shape = {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "vocab_size": vocab_size,
        "precision": precision,
        "device": device,
        "threads": threads,
        "steps": steps,
    }
    if contender is not None:
        from pretrain.bench.optimizer_contenders import measure

        typer.echo(json.dumps(measure(contender, shape)))
        return
    options = [f"--{name.replace('_', '-')}={value}" for name, value in shape.items()]
    report = _summarise(shape, run_contest("pretrain.bench.optimizer", _chosen(only), options, rounds))
    publish(report, table(report), out, as_json=as_json)


def _chosen(only: list[str] | None) -> tuple[str, ...]:
    unknown = [name for name in only or () if name not in CONTENDERS]
    if unknown:
        raise ConfigError(f"--only {unknown[0]}: there is no such contender; choose from {', '.join(CONTENDERS)}")
    return tuple(name for name in CONTENDERS if (name in only if only else name != "adamw-deepspeed"))


def _summarise(shape: dict[str, Any], runs: Runs) -> dict[str, Any]:
    first = next(iter(runs.values()))[0]
    seconds = {name: spread([s for run in found for s in run["seconds"]]).as_dict() for name, found in runs.items()}
    return {
        "benchmark": "optimizer",
        "shape": shape,
        "num_parameters": first["num_parameters"],
        "machine": {**machine(), "device": first["device_name"]},
        "versions": versions("torch", "deepspeed"),
        "seconds": seconds,
        "ratios": {
            f"{name}_over_{peer}": seconds[name]["median"] / seconds[peer]["median"]
            for name, peers in PEERS.items()
            for peer in peers
            if {name, peer} <= seconds.keys()
        },
        "runs": runs,
    }


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"{report['num_parameters'] / 1e6:.1f} million parameters, {report['shape']['precision']}, "
        f"{report['machine']['device']}",
        f"{'':16} {'ms per step':>12} {'middle half':>20}",
    ]
    for name, found in report["seconds"].items():
        middle = f"{found['lower'] * 1e3:.1f} to {found['upper'] * 1e3:.1f}"
        lines.append(f"{name:16} {found['median'] * 1e3:12.1f} {middle:>20}")
    for key, ratio in report["ratios"].items():
        lines.append(f"{key.replace('_over_', ' / ')}: {ratio:.3f} of the time")
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(app, name="python -m pretrain.bench.optimizer")
