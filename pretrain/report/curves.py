"""The curves of a run as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = dict[str, Any]

PARTS = ("data", "forward", "backward", "optimizer", "communication", "host")  # of a step: fields PART_seconds


def without_undone(records: Sequence[Record]) -> list[Record]:
    """What counts of a run that returned to a checkpoint, after a kill or by a rollback.

    A training record of a step that is not behind all others shows that the run returned: records of that step and of
    later ones, written before it, are of training that was undone.
    """
    counting: list[Record] = []
    newest = 0
    for record in records:
        if "lr" in record:
            if record["step"] <= newest:
                counting = [earlier for earlier in counting if earlier["step"] < record["step"]]
            newest = record["step"]
        counting.append(record)
    return counting


def series(records: Sequence[Record], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric; if a step was trained twice, the last record counts; only numbers do."""
    by_step = {record["step"]: record[name] for record in records if isinstance(record.get(name), int | float)}
    steps = sorted(by_step)
    return steps, [by_step[step] for step in steps]


def draw(records: Sequence[Record], path: Path) -> Path:
    """Write the curves of a run as a PNG with four panels, and two of its speed if the run measured it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    has_parts = bool(series(records, "step_seconds")[0])
    figure, axes = pyplot.subplots(2 + has_parts, 2, figsize=(12, 7.5 + 3.5 * has_parts), constrained_layout=True)
    panels = (
        ("masked language modelling loss", {"train": "mlm_loss", "validation": "validation_mlm_loss"}),
        ("contrastive loss (TACO)", {"train": "contrastive_loss", "validation": "validation_contrastive_loss"}),
        (
            "masked-token accuracy (validation)",
            {"model": "validation_accuracy", "always the most frequent token": "validation_baseline_accuracy"},
        ),
        ("gradient norm", {"train": "grad_norm"}),
    )
    for axis, (title, lines) in zip(axes.flat, panels, strict=False):
        _draw_panel(axis, title, records, lines)
    _show_small_values(axes.flat[1], records)
    _draw_learning_rate(axes.flat[3], records)
    if has_parts:
        _draw_panel(axes.flat[4], "tokens per second", records, {"train": "tokens_per_second"})
        axes.flat[4].set_ylim(bottom=0)
        _draw_parts(axes.flat[5], records)
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


def _draw_parts(axis: Axes, records: Sequence[Record]) -> None:
    """Where the time of a step goes, one part above the other."""
    measured = [record for record in records if all(f"{part}_seconds" in record for part in PARTS)]
    steps = [record["step"] for record in measured]
    layers = [[1e3 * record[f"{part}_seconds"] for record in measured] for part in PARTS]
    axis.stackplot(steps, layers, labels=PARTS)
    axis.set_title("ms of a step")
    axis.set_xlabel("optimizer step")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower left", ncols=3, fontsize="small")


def _show_small_values(axis: Axes, records: Sequence[Record]) -> None:
    """A logarithmic axis for the contrastive loss, which falls by orders of magnitude within the warm-up."""
    if any(value > 0 for value in series(records, "contrastive_loss")[1]):
        axis.set_yscale("log")


def _draw_learning_rate(axis: Axes, records: Sequence[Record]) -> None:
    steps, values = series(records, "lr")
    twin_axis = axis.twinx()
    twin_axis.plot(steps, values, color="tab:gray", linestyle="--", linewidth=1)
    twin_axis.set_ylabel("learning rate (dashed)")
