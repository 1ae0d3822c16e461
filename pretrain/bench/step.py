"""`taco bench step`: one optimizer step of ours against Hugging Face's BERT with the authors' loss, in one run.

Contenders run in separate processes, to measure each one's peak memory, and interleaved, so that a noisy machine is
noisy for all of them; figures are medians with quartiles, and only their ratios count:

    taco        this project's engine, both losses
    mlm         this project's engine, contrastive weight 0
    peer        transformers' BertForMaskedLM, logits of every position, and the authors' loss over a [B, L, K, D]
                tensor, computed out of place (their in-place version cannot train in fp32); its pairs are drawn
                beforehand, untimed
    peer_best   the same with its own best settings: SDPA, logits of masked positions only, on a GPU bf16 weights and
                torch.compile

On a GPU in 16 bits the peer runs under torch.autocast with fp32 weights, like transformers' Trainer.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import typer

from pretrain.bench.contest import Runs, machine, publish, run_contest, spread
from pretrain.bench.step_contenders import CONTENDERS, Shape, config_of, measure
from pretrain.bench.step_profile import show_profile
from pretrain.cli import new_program, run_program
from pretrain.errors import ConfigError

app = new_program()

Device = Literal["cpu", "cuda"]
Precision = Literal["fp32", "bf16"]
RowMode = Literal["stream", "document", "pack", "sentence"]


@app.command(epilog="Example: taco bench step --threads 2 --json")
def step(
    rows: Annotated[int, typer.Option(min=2, help="micro-batch size")] = 16,
    seq_length: Annotated[int, typer.Option(min=8, help="tokens per row")] = 256,
    num_layers: Annotated[int, typer.Option(min=1)] = 4,
    hidden_size: Annotated[int, typer.Option(min=64, help="64 features per head, feed-forward 4 times as wide")] = 512,
    num_negatives: Annotated[int, typer.Option(min=1)] = 50,
    dropout: Annotated[float, typer.Option(min=0.0, max=0.9, help="hidden and attention dropout")] = 0.1,
    row_mode: Annotated[RowMode, typer.Option(help="shape of the random rows; all but stream have padding")] = "stream",
    threads: Annotated[int, typer.Option(min=1, help="torch threads of every contender")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="timed steps per process, after a warm-up")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="processes per contender")] = 2,
    device: Annotated[Device, typer.Option(help="where the contenders compute")] = "cpu",
    precision: Annotated[Precision, typer.Option(help="precision of matrix products")] = "fp32",
    zero_stage: Annotated[int, typer.Option(min=0, max=3, help="ours: ZeRO stage")] = 1,
    recompute_layers: Annotated[int, typer.Option(min=0, help="ours: encoder layers that are recomputed")] = 0,
    offload: Annotated[bool, typer.Option("--offload", help="ours: optimizer state in CPU memory")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="ours: torch.compile each encoder layer")] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="ours: any key of the configuration, section.key=value")
    ] = None,
    peer_compile: Annotated[bool, typer.Option("--peer-compile", help="peer_best: torch.compile on a CPU too")] = False,
    only: Annotated[list[str] | None, typer.Option(help="taco, mlm, peer or peer_best; default: all")] = None,
    profile: Annotated[Path | None, typer.Option(help="write kernels, operators and host calls of a step here")] = None,
    out: Annotated[Path | None, typer.Option(help="also write the JSON here")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable output")] = False,
    contender: Annotated[str | None, typer.Option(hidden=True, help="measure this one in this process")] = None,
    profiled: Annotated[bool, typer.Option("--profiled", hidden=True, help="with a profile of one step")] = False,
) -> None:
    """Measure time and peak memory of a training step against Hugging Face with the authors' loss."""
    own = [f"zero.stage={zero_stage}"] if contender is None else []
    own += [f"train.recompute_layers={recompute_layers}"] if recompute_layers else []
    own += ["zero.offload_optimizer.device=cpu"] if offload else []
    own += ["train.compile=true"] if compiled else []
    shape = Shape(
        rows=rows,
        seq_length=seq_length,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_negatives=num_negatives,
        dropout=dropout,
        row_mode=row_mode,
        device=device,
        precision=precision,
        peer_compile=peer_compile,
        settings=(*own, *(settings or ())),
    )
    if contender is not None:
        typer.echo(json.dumps(measure(contender, shape, threads=threads, steps=steps, profile=profiled)))
        return
    config_of(shape, is_contrastive=True)  # a wrong setting is said once, before any contender starts
    arguments = [f"--threads={threads}", f"--steps={steps}", *shape.as_options(), *(["--profiled"] if profile else [])]
    runs = run_contest("pretrain.bench.step", _chosen(only), arguments, rounds)
    report = _summarise(shape, threads, runs)
    if profile is not None:
        profile.parent.mkdir(parents=True, exist_ok=True)
        tables = "\n\n".join(show_profile(name, answers[-1]) for name, answers in runs.items())
        profile.write_text(tables + "\n", encoding="utf-8")
    publish(report, _table(report), out, as_json=as_json)


def _chosen(only: list[str] | None) -> tuple[str, ...]:
    unknown = [name for name in only or () if name not in CONTENDERS]
    if unknown:
        raise ConfigError(f"--only {unknown[0]}: there is no such contender; choose from {', '.join(CONTENDERS)}")
    return tuple(name for name in CONTENDERS if not only or name in only)


def _summarise(shape: Shape, threads: int, runs: Runs) -> dict[str, Any]:
    times = {name: spread([s for run in answers for s in run["seconds"]]) for name, answers in runs.items()}
    seconds = {name: found.median for name, found in times.items()}
    memory = {name: max(run["peak_bytes"] for run in answers) for name, answers in runs.items()}
    first = next(iter(runs.values()))[0]
    tokens = shape.rows * shape.seq_length
    return {
        "benchmark": "step",
        "shape": {**vars(shape), "settings": list(shape.settings)},
        "threads": threads,
        "machine": {**machine(), "device": first["device_name"]},
        "versions": first["versions"],
        "seconds": seconds,
        "spread": {name: found.as_dict() for name, found in times.items()},
        "peak_bytes": memory,
        "tokens_per_second": {name: tokens / s for name, s in seconds.items()},
        "real_tokens_per_second": {name: runs[name][0]["real_tokens"] / s for name, s in seconds.items()},
        "model_tflops": {name: runs[name][0]["model_flops"] / s / 1e12 for name, s in seconds.items()},
        "gpu": {name: _gpu_figures(answers) for name, answers in runs.items() if "busy_seconds" in _profile(answers)},
        "parts": {name: answers[-1]["parts"] for name, answers in runs.items() if "parts" in answers[-1]},
        "ratios": _ratios(seconds, memory),
        "ratios_of_rounds": _ratios_of_rounds(runs),
        "runs": runs,
    }


def _profile(answers: list[dict[str, Any]]) -> dict[str, Any]:
    return answers[-1].get("profile", {})


def _gpu_figures(answers: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds in which the GPU was busy, kernels, and waits of the host, in one step."""
    return {name: _profile(answers)[name] for name in ("busy_seconds", "kernel_count", "synchronisations")}


def _ratios(seconds: dict[str, float], memory: dict[str, int]) -> dict[str, float]:
    """Ratios of ours to each other contender that took part."""
    figures: dict[str, Any] = {"time": seconds, "memory": memory}
    pairs = (("time", "peer"), ("memory", "peer"), ("time", "peer_best"), ("memory", "peer_best"), ("time", "mlm"))
    return {
        f"{figure}_taco_over_{other}": figures[figure]["taco"] / figures[figure][other]
        for figure, other in pairs
        if {"taco", other} <= seconds.keys()
    }


def _ratios_of_rounds(runs: Runs) -> dict[str, list[float]]:
    """The ratios of time of each round by itself: how far the machine moves them."""
    if "taco" not in runs:
        return {}
    return {
        f"time_taco_over_{other}": [
            median(ours["seconds"]) / median(theirs["seconds"])
            for ours, theirs in zip(runs["taco"], runs[other], strict=True)
        ]
        for other in runs
        if other != "taco"
    }


_RATIO_TEXTS = (
    ("time_taco_over_peer", "taco / peer:      {:.3f} of the time"),
    ("memory_taco_over_peer", "taco / peer:      {:.3f} of the peak memory"),
    ("time_taco_over_peer_best", "taco / peer_best: {:.3f} of the time"),
    ("memory_taco_over_peer_best", "taco / peer_best: {:.3f} of the peak memory"),
    ("time_taco_over_mlm", "taco / mlm:       {:.3f} of the time (the price of the contrastive loss)"),
)


def _table(report: dict[str, Any]) -> str:
    lines = [f"{'':9} {'seconds':>9} {'quartiles':>19} {'peak memory':>12} {'tokens/s':>10} {'model TFLOP/s':>14}"]
    for name, seconds in report["seconds"].items():
        memory, rate = report["peak_bytes"][name] / 1e9, report["tokens_per_second"][name]
        found = report["spread"][name]
        lines.append(
            f"{name:9} {seconds:9.4f} {found['lower']:9.4f} {found['upper']:9.4f} {memory:9.2f} GB {rate:10,.0f} "
            f"{report['model_tflops'][name]:14.3g}"
        )
    for name, gpu in report["gpu"].items():
        lines.append(
            f"{name:9} GPU busy {1e3 * gpu['busy_seconds']:.2f} ms, {gpu['kernel_count']:,} kernels, "
            f"{gpu['synchronisations']} waits of the host per step"
        )
    for name, parts in report["parts"].items():
        shares = ", ".join(f"{part} {1e3 * seconds:.2f}" for part, seconds in parts.items())
        lines.append(f"{name:9} ms per step: {shares}")
    for key, text in _RATIO_TEXTS:
        if key in report["ratios"]:
            rounds = report["ratios_of_rounds"].get(key, [])
            by_round = f"; by round {min(rounds):.3f} to {max(rounds):.3f}" if len(rounds) > 1 else ""
            lines.append(text.format(report["ratios"][key]) + by_round)
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(app, name="python -m pretrain.bench.step")
