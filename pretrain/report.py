"""`taco report`: the curves of a run as one picture and one self-contained page."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pretrain.cli import new_program, run_program

if TYPE_CHECKING:
    from matplotlib.axes import Axes

app = new_program()

PICTURE_FILE = "loss_curves.png"
PAGE_FILE = "report.html"

Record = dict[str, Any]


@app.command(epilog="Example: taco report runs/taco_base")
def report(run: Annotated[Path, typer.Argument(help="run folder (holds metrics.jsonl)")]) -> None:
    """Draw a run's losses, accuracy, learning rate and gradient norm; prints the paths of the picture and the page."""
    from pretrain.errors import DataError

    records = _read(run)
    try:
        picture = draw(records, run / PICTURE_FILE)
        page = _write_page(run, records, picture)
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


def series(records: Sequence[Record], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric; where a step was trained twice the last record counts."""
    by_step = {record["step"]: record[name] for record in records if record.get(name) is not None}
    steps = sorted(by_step)
    return steps, [by_step[step] for step in steps]


def draw(records: Sequence[Record], path: Path) -> Path:
    """Write the curves of a run as a PNG with four panels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(12, 7.5), constrained_layout=True)
    panels = (
        ("masked language modelling loss", {"train": "mlm_loss", "validation": "validation_mlm_loss"}),
        ("contrastive loss (TACO)", {"train": "contrastive_loss", "validation": "validation_contrastive_loss"}),
        (
            "masked-token accuracy (validation)",
            {"model": "validation_accuracy", "always the most frequent token": "validation_baseline_accuracy"},
        ),
        ("gradient norm", {"train": "grad_norm"}),
    )
    for axis, (title, lines) in zip(axes.flat, panels, strict=True):
        _draw_panel(axis, title, records, lines)
    _show_small_values(axes.flat[1], records)
    _draw_learning_rate(axes.flat[3], records)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _draw_panel(axis: Axes, title: str, records: Sequence[Record], lines: dict[str, str]) -> None:
    for label, name in lines.items():
        steps, values = series(records, name)
        if steps:
            marker = "o" if name.startswith("validation") else None
            axis.plot(steps, values, label=label, marker=marker, markersize=3, linewidth=1.3)
    axis.set_title(title)
    axis.set_xlabel("optimizer step")
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend()


def _show_small_values(axis: Axes, records: Sequence[Record]) -> None:
    """A logarithmic axis for the contrastive loss, which falls by orders of magnitude within the warm-up."""
    if any(value > 0 for value in series(records, "contrastive_loss")[1]):
        axis.set_yscale("log")


def _draw_learning_rate(axis: Axes, records: Sequence[Record]) -> None:
    steps, values = series(records, "lr")
    other = axis.twinx()
    other.plot(steps, values, color="tab:gray", linestyle="--", linewidth=1)
    other.set_ylabel("learning rate (dashed)")


def _write_page(run: Path, records: Sequence[Record], picture: Path) -> Path:
    """One HTML file that needs nothing beside it: the picture, the last figures and the configuration."""
    from pretrain import durable

    image = base64.b64encode(picture.read_bytes()).decode("ascii")
    last: Record = {}
    for record in records:
        last |= record
    rows = "".join(
        f"<tr><td>{html.escape(k)}</td><td>{html.escape(_show(v))}</td></tr>" for k, v in sorted(last.items())
    )
    sections = "".join(
        f"<h2>{name}</h2><pre>{html.escape((run / name).read_text(encoding='utf-8'))}</pre>"
        for name in ("config.yaml", "env.json")
        if (run / name).is_file()
    )
    page = (
        f"<!doctype html><meta charset='utf-8'><title>{html.escape(run.name)}</title>"
        "<style>body{font-family:sans-serif;max-width:75em;margin:2em auto;padding:0 1em}"
        "td{padding:.15em 1em .15em 0}pre{background:#f4f4f4;padding:1em;overflow:auto}img{max-width:100%}</style>"
        f"<h1>{html.escape(run.name)}</h1><img alt='curves of the run' src='data:image/png;base64,{image}'>"
        f"<h2>Last values</h2><table>{rows}</table>{sections}"
    )
    durable.write_text(run / PAGE_FILE, page)
    return run / PAGE_FILE


def _show(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value)


if __name__ == "__main__":
    run_program(app, name="python -m pretrain.report")
