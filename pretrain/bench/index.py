"""`taco bench index`: CPU time and memory of the sample index and the order, per row, against megatron-core's.

    taco-stream, taco-document         the row index of a dataset, built
    taco-sentence, taco-pack           the table of rows of sentences, of packed documents, built; 1 and 2 threads
    taco-blend                         look-ups in a blend of 8 datasets; nothing is stored
    taco-locate                        look-ups of where random rows begin; there is no table
    taco-order, taco-order-1e12        look-ups in the shuffled order; nothing is stored; of 10^12 samples
    megatron-stream, megatron-shuffle  build_sample_idx and the shuffled array that goes with it
    megatron-locate                    reading random samples from these arrays
    megatron-sentence                  build_mapping, the index of its BERT dataset, shuffle included
    megatron-blend                     build_blending_indices over 8 datasets
    memory                             reading the lengths once

Every contender has its own process and, except for those with two threads, one core. Documents and sentences are
synthetic, the same for all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pretrain.bench.contest import ONE_CORE, Runs, machine, medians, publish, run_contest, show_quartiles, spreads
from pretrain.cli import new_program, run_program

app = new_program()

CONTENDERS = (
    "taco-stream",
    "taco-document",
    "taco-sentence",
    "taco-sentence-2-threads",
    "taco-pack",
    "taco-pack-2-threads",
    "taco-blend",
    "taco-locate",
    "taco-order",
    "taco-order-1e12",
    "megatron-stream",
    "megatron-locate",
    "megatron-shuffle",
    "megatron-sentence",
    "megatron-blend",
    "memory",
)


@app.command(epilog="Example: taco bench index --sentences 20000000 --json")
def index(
    sentences: Annotated[int, typer.Option(min=10_000, help="sentences of about 26 tokens to index")] = 20_000_000,
    documents: Annotated[int, typer.Option(min=1_000, help="documents of about 900 tokens to index")] = 1_000_000,
    samples: Annotated[int, typer.Option(min=10_000, help="samples to order and to blend")] = 50_000_000,
    rounds: Annotated[int, typer.Option(min=1, help="processes per contender")] = 3,
    min_seconds: Annotated[float, typer.Option(min=0.0, help="CPU seconds to measure per process")] = 1.0,
    quick: Annotated[bool, typer.Option("--quick", help="one round on few rows, to see that it works")] = False,
    out: Annotated[Path | None, typer.Option(help="also write the JSON here")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable output")] = False,
    contender: Annotated[str | None, typer.Option(hidden=True, help="measure this one in this process")] = None,
) -> None:
    """Measure CPU time and bytes per row of the sample index against megatron-core's index builders."""
    if contender is not None:
        from pretrain.bench.index_contenders import measure

        typer.echo(json.dumps(measure(contender, sentences, documents, samples, min_seconds)))
        return
    if quick:
        sentences, documents, samples = min(sentences, 200_000), min(documents, 20_000), min(samples, 100_000)
        rounds, min_seconds = 1, 0.0
    sizes = {"sentences": sentences, "documents": documents, "samples": samples}
    arguments = [*(f"--{name}={size}" for name, size in sizes.items()), f"--min-seconds={min_seconds}"]
    runs = run_contest("pretrain.bench.index", CONTENDERS, arguments, rounds, ONE_CORE)
    report = summarise(sizes, runs)
    publish(report, table(report), out, as_json=as_json)


def summarise(setting: dict[str, Any], runs: Runs) -> dict[str, Any]:
    """The report: nanoseconds and bytes per row, and the ratios of what does the same job."""
    seconds = medians(runs, "seconds_per_row")
    return {
        "benchmark": "index",
        "setting": setting,
        "machine": machine(),
        "versions": runs["memory"][0]["versions"],
        "nanoseconds_per_row": {name: value * 1e9 for name, value in seconds.items()},
        "spread": spreads(runs, "seconds_per_row", 1e9),
        "wall_nanoseconds_per_row": {k: v * 1e9 for k, v in medians(runs, "wall_seconds_per_row").items()},
        "bytes_per_row": medians(runs, "bytes_per_row"),
        "fill_rate": medians(runs, "fill_rate"),
        "is_equal": {
            name: answers[0]["is_equal"] for name, answers in runs.items() if answers[0]["is_equal"] is not None
        },
        "ratios": {
            "stream_megatron_over_taco": sum(seconds[f"megatron-{part}"] for part in ("stream", "shuffle", "locate"))
            / sum(seconds[f"taco-{part}"] for part in ("stream", "order", "locate")),
            "stream_build_megatron_over_taco": seconds["megatron-stream"] / seconds["taco-stream"],
            "sentence_build_megatron_over_taco": seconds["megatron-sentence"] / seconds["taco-sentence"],
            "blend_megatron_over_taco": seconds["megatron-blend"] / seconds["taco-blend"],
            "order_megatron_over_taco": seconds["megatron-shuffle"] / seconds["taco-order"],
            # How close to the limit: both read the length of every sentence once.
            "sentence_build_taco_over_memory": _whole(runs, seconds, "taco-sentence") / _whole(runs, seconds, "memory"),
        },
        "runs": runs,
    }


def _whole(runs: Runs, seconds: dict[str, float], name: str) -> float:
    """Seconds that a contender takes for all its rows."""
    return seconds[name] * runs[name][0]["rows"]


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{'':20} {'ns per row':>11} {'quartiles':>17} {'bytes per row':>14}"]
    for name, nanoseconds in report["nanoseconds_per_row"].items():
        quartiles = show_quartiles(report["spread"][name])
        lines.append(f"{name:20} {nanoseconds:11,.1f} {quartiles:>17} {report['bytes_per_row'][name]:14,.2f}")
    for name, value in report["ratios"].items():
        lines.append(f"{name.replace('_', ' ')}: {value:,.1f}")
    wrong = [name for name, is_equal in report["is_equal"].items() if not is_equal]
    lines.append(f"indexes that differ from the version they are held against: {', '.join(wrong) or 'none'}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(app, name="python -m pretrain.bench.index")
