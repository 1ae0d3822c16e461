"""`taco bench loss`: the contrastive loss with its gradients, ours against the authors', in one run.

Contenders run in separate processes, interleaved, on the same vectors and pairs; figures are medians with quartiles:

    taco      ours in torch
    triton    ours in Triton, which draws its pairs itself; on a GPU, or with --interpreter to see that it works
    chunked   candidates gathered for some anchors at a time, with the same closed-form gradient
    authors   the authors' loss over a [B, L, K, D] tensor of all candidates, by autograd

Beside the loss the drawing of its pairs is measured, which all but `triton` do before. Figures of a CPU are CPU time,
those of a GPU wall-clock time until it is done.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pretrain.bench.contest import Runs, machine, publish, run_contest, spread
from pretrain.cli import new_program, run_program
from pretrain.errors import ConfigError

app = new_program()


@app.command(epilog="Example: taco bench loss --threads 2 --json")
def loss(
    rows: Annotated[int, typer.Option(min=2, help="micro-batch size")] = 16,
    seq_length: Annotated[int, typer.Option(min=2, help="tokens per row")] = 256,
    hidden_size: Annotated[int, typer.Option(min=1)] = 512,
    num_negatives: Annotated[int, typer.Option(min=1)] = 50,
    threads: Annotated[int, typer.Option(min=1, help="torch threads of every contender")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="timed calls per process, after one that is not")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="processes per contender")] = 3,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="where the contenders compute")] = "cpu",
    precision: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="type of the vectors")] = "fp32",
    interpreter: Annotated[
        bool, typer.Option("--interpreter", help="triton on a CPU: minutes, for tiny sizes")
    ] = False,
    only: Annotated[list[str] | None, typer.Option(help="taco, triton, chunked or authors; default: all")] = None,
    out: Annotated[Path | None, typer.Option(help="also write the JSON here")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable output")] = False,
    contender: Annotated[str | None, typer.Option(hidden=True, help="measure this one in this process")] = None,
) -> None:
    """Measure time and memory of the contrastive loss and of its pairs against the authors' way."""
    shape = {
        "rows": rows,
        "seq_length": seq_length,
        "hidden_size": hidden_size,
        "num_negatives": num_negatives,
        "device": device,
        "precision": precision,
    }
    if contender is not None:
        from pretrain.bench.loss_contenders import measure

        typer.echo(json.dumps(measure(contender, shape, threads, repeats)))
        return
    contenders = _chosen(only, has_triton=device != "cpu" or interpreter)
    options = [f"--{key.replace('_', '-')}={value}" for key, value in shape.items()]
    environment = {"TRITON_INTERPRET": "1"} if interpreter else {}
    runs = run_contest(
        "pretrain.bench.loss",
        contenders,
        [f"--threads={threads}", f"--repeats={repeats}", *options],
        rounds,
        environment,
    )
    report = summarise(shape, threads, runs)
    publish(report, table(report), out, as_json=as_json)


def _chosen(only: list[str] | None, *, has_triton: bool) -> tuple[str, ...]:
    from pretrain.bench.loss_contenders import CONTENDERS

    unknown = [name for name in only or () if name not in CONTENDERS]
    if unknown:
        raise ConfigError(f"--only {unknown[0]}: there is no such contender; choose from {', '.join(CONTENDERS)}")
    if "triton" in (only or ()) and not has_triton:
        raise ConfigError("--only triton: there is none on a CPU; add --interpreter, or --device cuda on a GPU")
    return tuple(name for name in CONTENDERS if (name in only if only else name != "triton" or has_triton))


def summarise(shape: dict[str, Any], threads: int, runs: Runs) -> dict[str, Any]:
    """The report: milliseconds of the loss with its gradients and of drawing pairs, and ours over every other's."""
    loss = {name: [s * 1e3 for run in answers for s in run["loss_seconds"]] for name, answers in runs.items()}
    pairs = {name: [s * 1e3 for run in answers for s in run["pairs_seconds"]] for name, answers in runs.items()}
    milliseconds = {name: spread(values).as_dict() for name, values in loss.items()}
    memory = {name: max(run["added_bytes"] for run in answers) for name, answers in runs.items()}
    first = next(iter(runs.values()))[0]
    return {
        "benchmark": "loss",
        "shape": shape,
        "threads": threads,
        "machine": {**machine(), "device": first["device_name"]},
        "versions": first["versions"],
        "loss_milliseconds": milliseconds,
        "pairs_milliseconds": {name: spread(values).as_dict() for name, values in pairs.items()},
        "added_bytes": memory,
        "loss": {name: answers[0]["loss"] for name, answers in runs.items()},
        "ratios": {
            f"time_{ours}_over_{other}": milliseconds[ours]["median"] / milliseconds[other]["median"]
            for ours in ("taco", "triton")
            for other in milliseconds
            if ours in milliseconds and other not in (ours, "triton")
        },
        "runs": runs,
    }


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{'':8} {'loss and gradients, ms':>26} {'pairs, ms':>26} {'memory on top':>14} {'loss':>10}"]
    for name in report["loss_milliseconds"]:
        loss, pairs = (
            f"{value['median']:.2f} ({value['lower']:.2f} - {value['upper']:.2f})"
            for value in (report["loss_milliseconds"][name], report["pairs_milliseconds"][name])
        )
        memory = report["added_bytes"][name] / 1e6
        lines.append(f"{name:8} {loss:>26} {pairs:>26} {memory:11,.1f} MB {report['loss'][name]:10.6f}")
    lines += [f"{key.replace('time_', '').replace('_', ' ')}: {value:.3f}" for key, value in report["ratios"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(app, name="python -m pretrain.bench.loss")
