"""`taco bench loader`: CPU time of a masked row, from mapped tokens to inputs of the model, against two peers.

    taco             micro-batches of masked rows (`BatchSource`), single tokens masked
    taco-whole-word  the same, whole words masked
    taco-tensors     whole words, and on to torch tensors; on the GPU if there is one
    megatron         megatron-core's BERTMaskedWordPieceDataset, item by item (it has no batches), whole words
    huggingface      datasets' arrow rows and transformers' DataCollatorForLanguageModeling, single tokens
    memory           what memory bandwidth alone would allow

All read the same tokens, 15 % masked 80/10/10, each in its own process on one core.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from pretrain.bench.contest import ONE_CORE, Runs, machine, medians, publish, run_contest, show_quartiles, spreads
from pretrain.cli import new_program, run_program
from pretrain.errors import DataError

app = new_program()

CONTENDERS = ("taco", "taco-whole-word", "taco-tensors", "megatron", "huggingface", "memory")
# Rows that 8 A100 take per second in training BERT-large, by sequence length (upper ends of published figures).
DEMAND = {128: 4000.0, 512: 720.0}


@app.command(epilog="Example: taco bench loader --seq-length 128 --json")
def loader(
    prefix: Annotated[str | None, typer.Option(help="WordPiece dataset of sentences; default: synthetic")] = None,
    seq_length: Annotated[int, typer.Option(min=16, help="tokens per row")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="rows per micro-batch")] = 32,
    tokens: Annotated[int, typer.Option(min=10_000, help="size of the synthetic dataset")] = 10_000_000,
    rounds: Annotated[int, typer.Option(min=1, help="processes per contender")] = 3,
    min_seconds: Annotated[float, typer.Option(min=0.0, help="CPU seconds to measure per process")] = 1.0,
    quick: Annotated[bool, typer.Option("--quick", help="one round on few tokens, to see that it works")] = False,
    out: Annotated[Path | None, typer.Option(help="also write the JSON here")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable output")] = False,
    contender: Annotated[str | None, typer.Option(hidden=True, help="measure this one in this process")] = None,
    folder: Annotated[Path, typer.Option(hidden=True, help="where contenders keep what they make")] = Path(),
) -> None:
    """Measure CPU time per masked row against megatron-core's BERT dataset and Hugging Face's collator."""
    if contender is not None:
        from pretrain.bench.loader_contenders import measure

        assert prefix is not None
        typer.echo(json.dumps(measure(contender, prefix, folder, seq_length, batch, min_seconds)))
        return
    if prefix is not None:
        _check_dataset(prefix)
    if quick:
        tokens, rounds, min_seconds = min(tokens, 60_000), 1, 0.01
    with tempfile.TemporaryDirectory(prefix="taco-bench-") as scratch:
        data = prefix or _make_dataset(Path(scratch), tokens)
        arguments = [f"--prefix={data}", f"--folder={scratch}", f"--seq-length={seq_length}"]
        arguments += [f"--batch={batch}", f"--min-seconds={min_seconds}"]
        runs = run_contest("pretrain.bench.loader", CONTENDERS, arguments, rounds, ONE_CORE)
    wrong = [name for name, answers in runs.items() if not all(answer["is_equal"] for answer in answers)]
    if wrong:
        raise DataError(
            f"{prefix or 'the synthetic dataset'}: the rows of {', '.join(wrong)} do not hold the dataset's tokens, so "
            "their times cannot be compared; leave out --prefix to compare on a synthetic dataset"
        )
    setting = {"prefix": prefix, "seq_length": seq_length, "batch": batch, "tokens": None if prefix else tokens}
    report = summarise(setting, runs)
    publish(report, table(report), out, as_json=as_json)


def _check_dataset(prefix: str) -> None:
    """Raises DataError for a dataset that the peers cannot read, before anything is measured."""
    from pretrain.data.dataset.indexed_dataset import IndexedDataset
    from pretrain.data.tokenizer.load import load_dataset_tokenizer

    manifest = IndexedDataset(prefix).manifest
    if manifest is None:
        raise DataError(f"{prefix}.json: is missing, and names the tokenizer; preprocess the corpus again")
    load_dataset_tokenizer(prefix, manifest.tokenizer)
    if manifest.tokenizer.kind != "wordpiece":
        raise DataError(
            f"{prefix}: was made with {manifest.tokenizer.name} (kind {manifest.tokenizer.kind}), and the peers read "
            "WordPiece only; preprocess the corpus with a vocab.txt, or leave out --prefix"
        )
    if manifest.sequences <= manifest.documents:
        raise DataError(
            f"{prefix}: has {manifest.sequences:,} sequences in {manifest.documents:,} documents, and megatron-core's "
            "BERT dataset wants one per sentence; preprocess the corpus with --split-sentences, or leave out --prefix"
        )


def _make_dataset(folder: Path, tokens: int) -> str:
    from pretrain.bench.synthetic import write_corpus

    return str(write_corpus(folder, tokens))


def summarise(setting: dict[str, Any], runs: Runs) -> dict[str, Any]:
    """The report: microseconds of CPU per row, their ratios, and how many machines of 8 A100 one core feeds."""
    seconds = medians(runs, "seconds_per_row")
    demand = DEMAND.get(setting["seq_length"])
    return {
        "benchmark": "loader",
        "setting": setting,
        "machine": machine(),
        "versions": {name: version for answers in runs.values() for name, version in answers[0]["versions"].items()},
        "microseconds_per_row": {name: value * 1e6 for name, value in seconds.items()},
        "spread": spreads(runs, "seconds_per_row", 1e6),
        "rows_per_second_per_core": {name: 1 / value for name, value in seconds.items()},
        "is_equal": {name: all(run["is_equal"] for run in answers) for name, answers in runs.items()},
        "ratios": {
            "megatron_over_whole_word": seconds["megatron"] / seconds["taco-whole-word"],
            "huggingface_over_taco": seconds["huggingface"] / seconds["taco"],
            "taco_over_memory": seconds["taco"] / seconds["memory"],
        },
        "demand_of_8_a100": demand,
        "feeds_8_a100_per_core": None if demand is None else {name: 1 / v / demand for name, v in seconds.items()},
        "runs": runs,
    }


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    feeds = report["feeds_8_a100_per_core"]
    header = f"{'':16} {'us per row':>12} {'quartiles':>21} {'rows/s per core':>16}"
    lines = [header if feeds is None else f"{header} {'feeds x 8 A100':>15}"]
    for name, microseconds in report["microseconds_per_row"].items():
        quartiles = show_quartiles(report["spread"][name], 2)
        line = f"{name:16} {microseconds:12,.2f} {quartiles:>21} {1e6 / microseconds:16,.0f}"
        lines.append(line if feeds is None else f"{line} {feeds[name]:15,.1f}")
    ratios = report["ratios"]
    lines.append(f"megatron / taco-whole-word: {ratios['megatron_over_whole_word']:,.0f}")
    lines.append(f"huggingface / taco:         {ratios['huggingface_over_taco']:,.0f}")
    lines.append("rows equal the dataset's tokens")
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(app, name="python -m pretrain.bench.loader")
