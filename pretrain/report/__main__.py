"""`taco report`: the curves of a run as one picture and one self-contained page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pretrain.cli import new_program, run_program
from pretrain.report.curves import Record, draw, without_undone
from pretrain.report.page import read_descriptions, write_page

app = new_program()

PICTURE_FILE = "loss_curves.png"


@app.command(epilog="Example: taco report runs/taco_base")
def report(run: Annotated[Path, typer.Argument(help="run folder (holds metrics.jsonl)", readable=False)]) -> None:
    """Draw a run's losses, accuracy, learning rate and gradient norm; print the paths of the picture and the page."""
    from pretrain.errors import DataError
    from pretrain.metrics import describe_bad_lines

    records, bad_lines = _read(run)
    descriptions = read_descriptions(run)
    try:
        picture = draw(records, run / PICTURE_FILE)
        page = write_page(run, records, picture, descriptions)
    except OSError as error:
        raise DataError(f"{run}: the report cannot be written: {error}; free space or copy the run elsewhere") from None
    typer.echo(f"picture: {picture}\npage:    {page}")
    if bad_lines:
        typer.echo(describe_bad_lines(run, bad_lines))


def _read(run: Path) -> tuple[list[Record], list[int]]:
    """The records of the run, at least one, and the numbers of the lines that are none."""
    from pretrain.errors import DataError
    from pretrain.metrics import METRICS_FILE, describe_bad_lines, read_records

    records, bad_lines = read_records(run)
    if not records:
        if not run.is_dir():
            what = "is a file" if run.exists() else "no such folder"
            raise DataError(f"{run}: {what}; give the folder of a run, which holds {METRICS_FILE}")
        reason = f" ({describe_bad_lines(run, bad_lines)})" if bad_lines else ""
        raise DataError(
            f"{run / METRICS_FILE}: no records yet; give the folder of a run that has logged a step{reason}"
        )
    return without_undone(records), bad_lines


if __name__ == "__main__":
    run_program(app, name="python -m pretrain.report")
