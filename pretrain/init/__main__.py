"""`taco init`: a new project with configurations, job scripts and the next commands, from any installation.

taco init thesis
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pretrain.cli import new_program, run_program

app = new_program()


@app.command(epilog="Example: taco init thesis")
def init(folder: Annotated[Path, typer.Argument(help="the project's folder; made if it is not there")]) -> None:
    """Lay out a project: configs/, slurm/, README.md with the next commands, .gitignore.

    No file that is there is changed: one with other content is named, and nothing is written (exit code 2). What is
    missing is added, so running it again does no harm.
    """
    from pretrain.init.project import lay_out

    written = lay_out(folder)
    if written:
        typer.echo(f"{folder}: {len(written)} files written; {folder / 'README.md'} says what comes next")
    else:
        typer.echo(f"{folder}: all files are there already; {folder / 'README.md'} says what comes next")


if __name__ == "__main__":
    run_program(app, name="python -m pretrain.init")
