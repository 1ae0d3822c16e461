"""Holds datasets against the hashes in their manifests; a person or a job runs it after copying, before training.

    taco data verify data/train data/valid

Exit code 0 says that every byte is as it was written, 1 that something is wrong, each problem with file and byte range.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pretrain.cli import new_program, run_program

app = new_program()


@app.command()
def main(
    prefixes: Annotated[list[str], typer.Argument(help="dataset prefixes, with or without .bin, .idx or .json")],
    as_json: Annotated[bool, typer.Option("--json", help="report as JSON on standard output")] = False,
) -> None:
    """Recompute the hashes of datasets and name every damaged range.

    Example: taco data verify data/train data/valid
    """
    results = [check_dataset(_strip_suffix(prefix)) for prefix in prefixes]
    print(json.dumps(results) if as_json else "\n".join(_describe(result) for result in results))
    if not all(result["ok"] for result in results):
        raise typer.Exit(1)


def check_dataset(prefix: str) -> dict[str, Any]:
    """Prefix, `ok`, problems, and for a sound dataset its documents and tokens."""
    from pretrain.data.indexed_dataset import IndexedDataset, verify

    problems = verify(prefix) or _tokenizer_problems(prefix)
    result: dict[str, Any] = {"prefix": prefix, "ok": not problems, "problems": problems}
    if not problems:
        dataset = IndexedDataset(prefix)
        result |= {"documents": dataset.num_documents, "tokens": dataset.num_tokens}
    return result


def _tokenizer_problems(prefix: str) -> list[str]:
    """Whether the folder PREFIX.tokenizer is as it was, and the tokenizer that made the dataset."""
    from pretrain.data.manifest import Manifest
    from pretrain.data.tokenizer import load_tokenizer
    from pretrain.data.tokenizer_folder import find_damage
    from pretrain.errors import DataError

    folder, manifest = Path(f"{prefix}.tokenizer"), Manifest.load(Path(f"{prefix}.json"))
    problems = find_damage(folder, manifest.tokenizer_files)
    if problems or not folder.exists():
        return problems
    expected = manifest.tokenizer
    try:
        found = load_tokenizer(folder).info
    except DataError as error:
        return [str(error)]
    if found.sha256 == expected.sha256:
        return []
    return [
        f"{folder}: expected the tokenizer with sha256 {expected.sha256}, found {found.sha256}; restore it from a copy"
    ]


def _strip_suffix(prefix: str) -> str:
    """Lets `data/*.json` stand for the prefixes of all datasets in data."""
    path = Path(prefix)
    return str(path.with_suffix("")) if path.suffix in (".bin", ".idx", ".json") and path.is_file() else prefix


def _describe(result: dict[str, Any]) -> str:
    if result["ok"]:
        return f"{result['prefix']}: sound: {result['documents']:,} documents, {result['tokens']:,} tokens"
    return "\n".join(f"{result['prefix']}: WRONG: {problem}" for problem in result["problems"])


if __name__ == "__main__":
    run_program(app)
