"""Checks datasets against the hashes in their manifests; run it after copying and before training.

    taco data verify data/train data/valid --threads 8

Exit code 0 means that every byte is as written, 1 that there are problems, each reported with file and byte range.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pretrain.cli import new_program, run_program
from pretrain.errors import counted

if TYPE_CHECKING:
    from pretrain.data.dataset.verification import Progress, Verification

app = new_program()
_MOST_THREADS = 8


@app.command()
def main(
    prefixes: Annotated[list[str], typer.Argument(help="dataset prefixes, with or without .bin, .idx or .json")],
    threads: Annotated[int, typer.Option(help="chunks hashed at the same time; 0: one per core, at most 8", min=0)] = 0,
    deep: Annotated[bool, typer.Option("--deep", help="also check every token id against the vocabulary")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="report as JSON on standard output")] = False,
) -> None:
    """Recompute the hashes of datasets and report all damage.

    Example: taco data verify data/train data/valid --deep
    """
    from pretrain.data.dataset.dataset_format import prefix_of

    results = check_datasets([prefix_of(name) for name in prefixes], threads=threads, deep=deep)
    print(json.dumps(results) if as_json else "\n".join(_describe(result) for result in results))
    if not all(result["ok"] for result in results):
        raise typer.Exit(1)


def check_datasets(prefixes: list[str], *, threads: int = 0, deep: bool = False) -> list[dict[str, Any]]:
    """The report of `check_dataset` for each dataset, with one progress meter over all of them."""
    from data_tools.progress import ByteCounter, ProgressMeter
    from pretrain.data.dataset.verification import count_bytes

    with ProgressMeter("verifying", sum(map(count_bytes, prefixes))) as meter:
        advance = ByteCounter(meter)
        return [check_dataset(prefix, threads=threads, deep=deep, on_progress=advance) for prefix in prefixes]


def check_dataset(
    prefix: str, *, threads: int = 0, deep: bool = False, on_progress: Progress = lambda num_bytes: None
) -> dict[str, Any]:
    """Prefix, `ok`, problems as sentences and as `damage`, and the counts of an intact dataset."""
    from pretrain.data.dataset.verification import check

    verification = check(prefix, threads=threads or _cores(), deep=deep, on_progress=on_progress)
    return {
        "prefix": prefix,
        "ok": not verification.problems,
        "problems": [str(problem) for problem in verification.problems],
        "damage": [asdict(problem) for problem in verification.problems],
        **({} if verification.problems else _counts(verification)),
    }


def _counts(verification: Verification) -> dict[str, int]:
    counts = {
        "documents": verification.documents,
        "sequences": verification.sequences,
        "tokens": verification.tokens,
        "largest_id": verification.largest_id,
        "empty_documents": verification.empty_documents,
    }
    return {name: count for name, count in counts.items() if count is not None}


def _cores() -> int:
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, _MOST_THREADS)


def _describe(result: dict[str, Any]) -> str:
    if not result["ok"]:
        return "\n".join(f"{result['prefix']}: WRONG: {problem}" for problem in result["problems"])
    line = (
        f"{result['prefix']}: sound: {counted(result['documents'], 'document')}, {counted(result['tokens'], 'token')}"
    )
    if "largest_id" in result:
        line += f"; largest id {result['largest_id']:,}, {result['empty_documents']:,} empty documents"
    return line


if __name__ == "__main__":
    run_program(app)
