"""`taco report`: the curves of a run as one picture and one self-contained page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pretrain.cli import new_program, run_program
from pretrain.report.curves import Record, draw
from pretrain.report.page import write_page

app = new_program()

PICTURE_FILE = "loss_curves.png"


@app.command(epilog="Example: taco report runs/taco_base")
def report(run: Annotated[Path, typer.Argument(help="run folder (holds metrics.jsonl)")]) -> None:
    """Draw a run's losses, accuracy, learning rate and gradient norm; print the paths of the picture and the page."""
    from pretrain.errors import DataError

    records = _read(run)
    try:
        picture = draw(records, run / PICTURE_FILE)
        page = write_page(run, records, picture)
    except OSError as error:
        raise DataError(f"{run}: the report cannot be written: {error}; free space or copy the run elsewhere") from None
    typer.echo(f"picture: {picture}\npage:    {page}")


def _read(run: Path) -> list[Record]:
    from pretrain.errors import DataError
    from pretrain.metrics import METRICS_FILE, read_metrics

    records = read_metrics(run)
    if not records:
        raise DataError(f"{run / METRICS_FILE}: no records yet; give the folder of a run that has logged a step")
    return records


if __name__ == "__main__":
    run_program(app, name="python -m pretrain.report")
