"""Builds the index tables of datasets before training, and reports the rows that a row mode gives.

    taco data index data/train --row-mode pack --seq-length 512

Training builds missing tables itself, before any process group exists; index a large dataset here once, so that no job
waits for it. See docs/data-index.md.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pretrain.cli import new_program, run_program
from pretrain.errors import ConfigError, counted

if TYPE_CHECKING:
    from pretrain.config.sections import RowMode
    from pretrain.data.splits import Split

app = new_program()


@app.command(epilog="Example: taco data index data/books data/web --row-mode pack --seq-length 512")
def main(
    prefixes: Annotated[list[str], typer.Argument(help="dataset prefixes, with or without .bin, .idx or .json")],
    row_mode: Annotated[str, typer.Option(help="stream, document, pack or sentence")] = "pack",
    seq_length: Annotated[int, typer.Option(min=8, help="tokens per row, [CLS] and [SEP] included")] = 512,
    splits: Annotated[str, typer.Option(help="like data.splits: train=0.98,test=0.02")] = "",
    index_cache: Annotated[Path | None, typer.Option(help="folder to use if PREFIX.index cannot be written")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="threads that build; default: one per CPU")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="report as JSON on standard output")] = False,
) -> None:
    """Build or open the index of datasets; print rows, fill rate, bytes per row and seconds."""
    mode = _row_mode(row_mode)
    chosen = _splits(splits)
    reports = [
        index_dataset(prefix, mode, seq_length, split, index_cache, threads) for prefix in prefixes for split in chosen
    ]
    print(json.dumps(reports) if as_json else "\n".join(_describe(report) for report in reports))


def index_dataset(
    prefix: str,
    mode: RowMode,
    seq_length: int,
    split: Split | None = None,
    index_cache: Path | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Prefix, split, row mode, rows, tokens, fill rate, bytes per row and seconds of one index.

    Raises:
        ConfigError: a row is longer than the row mode supports.
        DataError: the dataset is damaged, or the index cannot be stored.
    """
    from pretrain.data.dataset.indexed_dataset import IndexedDataset
    from pretrain.data.row_modes import open_rows

    dataset = IndexedDataset(prefix)
    start = time.monotonic()
    rows = open_rows(
        dataset, mode, seq_length, split=split, cache_folder=index_cache, num_threads=threads, must_store=True
    )
    return {
        "prefix": dataset.prefix,
        "split": None if split is None else split.name,
        "row_mode": mode,
        "seq_length": seq_length,
        "documents": dataset.num_documents,
        "tokens": rows.num_tokens,
        "rows": rows.num_rows,
        "left_out": rows.num_left_out,
        "fill_rate": rows.num_filled / max(rows.num_rows * seq_length, 1),
        "bytes_per_row": rows.memory_bytes / max(rows.num_rows, 1),
        "seconds": time.monotonic() - start,
    }


def _row_mode(name: str) -> RowMode:
    from typing import get_args

    from pretrain.config.sections import RowMode

    for mode in get_args(RowMode):
        if mode == name:
            row_mode: RowMode = mode
            return row_mode
    raise ConfigError(f"--row-mode {name}: expected one of {', '.join(get_args(RowMode))}")


def _splits(text: str) -> list[Split | None]:
    """The splits that `name=share,...` names; [None], the whole dataset, if the text is empty."""
    from pydantic import ValidationError

    from pretrain.config.checks import check_splits
    from pretrain.config.sections import SplitsSection
    from pretrain.config.values import WrongValueError, read_number
    from pretrain.data.splits import split_named

    if not text:
        return [None]
    shares: dict[str, float] = {}
    try:
        for part in text.split(","):
            name, _, share = (word.strip() for word in part.partition("="))
            if name not in SplitsSection.model_fields or name in shares:
                raise WrongValueError(f"found {part!r}; each split has one share")
            shares[name] = read_number(share)
        section = SplitsSection.model_validate(shares)
    except WrongValueError as error:
        reason = str(error)
    except ValidationError as error:
        reason = "; ".join(f"{detail['loc'][0]}: {detail['msg'].lower()}" for detail in error.errors())
    else:
        reason = ""
    if reason:
        raise ConfigError(f"--splits {text}: expected shares such as train=0.98,validation=0.01,test=0.01 ({reason})")
    problems = check_splits(section)
    if problems:
        raise ConfigError(f"--splits: {problems[0]}")
    return [split_named(section, name) for name in ("train", "validation", "test") if getattr(section, name)]


def _describe(report: dict[str, Any]) -> str:
    split = f" ({report['split']})" if report["split"] else ""
    rows, tokens = counted(report["rows"], "row"), counted(report["tokens"], "token")
    return (
        f"{report['prefix']}{split}: {rows} of {report['seq_length']} in mode {report['row_mode']} "
        f"out of {tokens}; {report['fill_rate']:.2%} of all places filled, {report['left_out']:,} "
        f"tokens left out; {report['bytes_per_row']:.2f} bytes per row; {report['seconds']:.2f} s"
    )


if __name__ == "__main__":
    run_program(app)
