"""`taco checkpoint`: lists, verifies, prunes and rewrites the checkpoints of a run.

taco checkpoint ls RUN
taco checkpoint verify RUN
taco checkpoint prune RUN --keep 2
taco checkpoint reshape RUN OUT
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from pretrain.cli import new_program, run_program

app = new_program()

RunArgument = Annotated[
    Path, typer.Argument(help="run folder, its checkpoints/, or one step-NNNNNNN folder", readable=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="machine-readable output")]


@app.callback(epilog="Example: taco checkpoint ls runs/taco_base")
def checkpoint() -> None:
    """List, verify, prune and rewrite the checkpoints of a run."""


@app.command("ls", epilog="Example: taco checkpoint ls runs/taco_base")
def ls(run: RunArgument, as_json: JsonOption = False) -> None:
    """List all checkpoints, newest first: step, size, age, state (complete, damaged or unreadable).

    `verify` reads the files; here a checkpoint is called damaged by its manifest alone.
    """
    from pretrain.errors import CheckpointError

    rows, problems = [], []
    for folder in _folders(run):
        row, problem = _describe(folder)
        rows.append(row)
        problems += [problem] if problem else []
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        _print_table(rows)
    if problems:
        raise CheckpointError(_with_number_of_others(problems))


def _print_table(rows: list[dict[str, Any]]) -> None:
    typer.echo(f"{'step':>10}  {'rows seen':>12}  {'size':>10}  {'age':>8}  {'state':<10}  folder")
    for row in rows:
        size, age = f"{row['num_bytes'] / 1e6:.1f} MB", _format_age(row["age_seconds"])
        seen, state = row["consumed_samples"], row["state"]
        typer.echo(f"{row['step']:>10}  {seen:>12}  {size:>10}  {age:>8}  {state:<10}  {row['folder']}")


@app.command("verify", epilog="Example: taco checkpoint verify runs/taco_base")
def verify(run: RunArgument, as_json: JsonOption = False) -> None:
    """Recompute the hash of every file; exit code 1 if anything differs from what was written, or cannot be read."""
    from pretrain.checkpoint.manifest import CheckpointUnreadableError, find_problems

    report: dict[str, list[str]] = {}
    unreadable: list[str] = []
    for folder in _folders(run):
        try:
            problems = find_problems(folder)
            verdict = "BAD" if problems else "good"
        except CheckpointUnreadableError as error:
            problems, verdict = [str(error)], "not verified"
            unreadable.append(str(error))
        report[str(folder)] = problems
        if not as_json:
            typer.echo(f"{folder}: {verdict}")
            for problem in problems if verdict == "BAD" else ():
                typer.echo(f"  {problem}")
    if as_json:
        typer.echo(json.dumps(report, indent=1))
    if unreadable:
        raise CheckpointUnreadableError(_with_number_of_others(unreadable))
    if any(report.values()):
        raise typer.Exit(1)


def _with_number_of_others(problems: list[str]) -> str:
    return problems[0] + (f"; and {len(problems) - 1} more like this" if problems[1:] else "")


@app.command("prune", epilog="Example: taco checkpoint prune runs/taco_base --keep 2 --every 50000 --dry-run")
def prune(
    run: Annotated[Path, typer.Argument(help="run folder or its checkpoints/", readable=False)],
    keep: Annotated[int, typer.Option(min=1, help="how many of the newest checkpoints to keep")] = 3,
    every: Annotated[int | None, typer.Option(min=1, help="also keep steps that are multiples of this")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be removed, and remove nothing")] = False,
) -> None:
    """Remove older checkpoints; the newest one that verifies always stays.

    Folders of another run, under another name than their manifest's step, or with a damaged manifest neither count nor
    go. Not for a run in progress, which prunes by itself (checkpoint.keep, checkpoint.keep_every).
    """
    from pretrain.checkpoint.manifest import find_problems, has_manifest, list_checkpoints
    from pretrain.checkpoint.run_record import is_own, own_run_id
    from pretrain.checkpoint.store import superfluous
    from pretrain.errors import CheckpointError, counted

    if has_manifest(run):  # its neighbours were not named
        raise CheckpointError(f"{run}: is one checkpoint; name the folder of its run, whose old checkpoints are to go")
    root = _folders(run)[0].parent
    run_id = own_run_id(root)
    checkpoints = []
    for folder in list_checkpoints(root):
        if is_own(folder, run_id):
            checkpoints.append(folder)
        else:
            typer.echo(f"kept: {folder} is renamed, damaged or of another run, and does not count")
    doomed = superfluous(checkpoints, keep, every)
    newest_good = next((folder for folder in checkpoints if not find_problems(folder)), None)
    if newest_good is None:
        typer.echo(f"{root}: no checkpoint is good, so none is removed; see `taco checkpoint verify`", err=True)
        raise typer.Exit(1)
    if not doomed:
        typer.echo(f"nothing to remove: {root} holds {counted(len(checkpoints), 'checkpoint')} of this run")
    for folder in doomed:
        if folder == newest_good:
            typer.echo(f"kept: {folder} is the newest good one")
            continue
        if not dry_run:
            _remove(folder)
        typer.echo(f"{'would remove' if dry_run else 'removed'}: {folder}")


def _remove(folder: Path) -> None:
    from pretrain.checkpoint.store import remove_checkpoint
    from pretrain.errors import CheckpointError

    try:
        remove_checkpoint(folder)
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: cannot be removed: {error.strerror or error}") from None


@app.command("reshape", epilog="Example: taco checkpoint reshape runs/taco_base archive/taco_base --weights-only")
def reshape(
    checkpoint: Annotated[
        Path, typer.Argument(help="run folder (its newest checkpoint) or a step-NNNNNNN folder", readable=False)
    ],
    out: Annotated[Path, typer.Argument(help="new folder for the rewritten checkpoint")],
    files: Annotated[int, typer.Option(min=1, max=100_000, help="number of state files to write")] = 1,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="leave out optimizer state; enough for run.init_from")
    ] = False,
) -> None:
    """Rewrite a checkpoint of any layout as a given number of files, or as weights only.

    Not needed to continue a run in another layout: `taco train` reads a checkpoint of any tensor, pipeline and
    data-parallel size and ZeRO stage.
    """
    from pretrain.checkpoint.reshape import reshape_checkpoint
    from pretrain.checkpoint.run_record import find_own_checkpoint

    written = reshape_checkpoint(find_own_checkpoint(checkpoint), out, num_files=files, weights_only=weights_only)
    typer.echo(f"written: {written}")


def _folders(run: Path) -> list[Path]:
    from pretrain.checkpoint.manifest import find_checkpoint, has_manifest, list_checkpoints

    if has_manifest(run):
        return [run]
    return list_checkpoints(find_checkpoint(run).parent)


def _describe(folder: Path) -> tuple[dict[str, Any], str | None]:
    """The row of a checkpoint, and why it cannot be read if it cannot."""
    from pretrain.checkpoint.manifest import CheckpointManifest, CheckpointUnreadableError, step_named
    from pretrain.errors import CheckpointError

    row: dict[str, Any] = {
        "folder": str(folder),
        "step": step_named(folder),
        "num_bytes": 0,
        "age_seconds": 0.0,
        "consumed_samples": 0,
        "state": "unreadable",
    }
    try:
        row["age_seconds"] = time.time() - folder.stat().st_mtime
        row["num_bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        manifest = CheckpointManifest.load(folder)
    except CheckpointUnreadableError as error:
        return row, str(error)
    except CheckpointError:
        return row | {"state": "damaged"}, None
    except OSError as error:
        return row, f"{error.filename or folder}: cannot be read: {error.strerror or error}"
    return row | {"step": manifest.step, "consumed_samples": manifest.consumed_samples, "state": "complete"}, None


def _format_age(seconds: float) -> str:
    from pretrain.runlog import format_seconds

    return format_seconds(seconds)


if __name__ == "__main__":
    run_program(app, name="python -m pretrain.checkpoint")
