"""The plot of `taco data stats`: document lengths, and frequency over rank of tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.output.protection import in_the_way
from data_tools.own_files import PICTURE_BY, head_of, is_picture
from pretrain.errors import DataError, counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(reports: list[dict[str, Any]], path: Path) -> None:
    """Writes a PNG with two panels; several datasets share both.

    Raises:
        DataError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), constrained_layout=True)
    names = [Path(report["prefix"]).name for report in reports]
    figure.suptitle(_title(reports, names), fontsize=12)
    for number, (report, name) in enumerate(zip(reports, names, strict=True)):
        color = f"C{number}"
        _draw_lengths(left, report["tokens_per_document"], name, color)
        _draw_frequencies(right, report["vocabulary"], name, color)
    _label_lengths(left, reports)
    _label_frequencies(right)
    try:
        figure.savefig(path, dpi=120, format="png", metadata={"Software": PICTURE_BY.decode()})
    except OSError as error:
        raise DataError(f"--plot {path}: cannot be written: {error.strerror}; choose another file") from None
    finally:
        pyplot.close(figure)


def check_picture(path: Path) -> None:
    """Raises DataError: there is a file at `path` that is no picture of `taco data stats`, or no folder for it."""
    try:
        data = head_of(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(f"--plot {path}: cannot be written: {error.strerror}; choose another file") from None
    if data and not is_picture(data):
        raise in_the_way(path, "choose another file for --plot, or move it away")


def _title(reports: list[dict[str, Any]], names: list[str]) -> str:
    parts = [
        f"{name}: {counted(report['documents'], 'document')}, {counted(report['tokens'], 'token')}"
        for name, report in zip(names, reports, strict=True)
    ]
    return "\n".join(parts[:4] + ([f"and {len(parts) - 4} more"] if len(parts) > 4 else []))


def _draw_lengths(axis: Axes, lengths: dict[str, Any], name: str, color: str) -> None:
    """Share of documents, filled, and of tokens, as a line: long documents are few but hold most of the text."""
    bars = [bar for bar in lengths["fine_histogram"] if bar["low"] > 0]
    if not bars:
        return
    documents, tokens = (sum(bar[key] for bar in bars) for key in ("number", "tokens"))
    edges = [bar["low"] for bar in bars] + [bars[-1]["high"] + 1]
    axis.stairs([100 * bar["number"] / documents for bar in bars], edges, fill=True, alpha=0.35, color=color)
    axis.stairs([100 * bar["number"] / documents for bar in bars], edges, color=color, label=f"{name}: documents")
    shares = [100 * bar["tokens"] / tokens for bar in bars]
    axis.stairs(shares, edges, color=color, linestyle="--", linewidth=1.5, label=f"{name}: tokens in them")
    median = lengths["percentiles"]["50"]
    axis.axvline(max(median, 1), color=color, linewidth=1, linestyle=":", label=f"median {median:,}")


def _label_lengths(axis: Axes, reports: list[dict[str, Any]]) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    axis.set_xscale("log", base=2)
    lows = [bar["low"] for report in reports for bar in report["tokens_per_document"]["fine_histogram"] if bar["low"]]
    highs = [bar["high"] + 1 for report in reports for bar in report["tokens_per_document"]["fine_histogram"]]
    if lows:
        axis.set_xlim(min(lows), max(highs))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_ylim(bottom=0)
    axis.set_xlabel("length of the document, tokens (four bins per doubling)")
    axis.set_ylabel("share per bin, %")
    axis.set_title("Documents by length")
    axis.grid(axis="y", alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=9)


def _draw_frequencies(axis: Axes, vocabulary: dict[str, Any], name: str, color: str) -> None:
    if not vocabulary["frequencies"]:
        return
    ranks, counts = zip(*vocabulary["frequencies"], strict=True)
    of = f" of {vocabulary['size']:,}" if vocabulary["size"] is not None else ""
    axis.plot(ranks, counts, color=color, linewidth=1.8, label=f"{name}: {vocabulary['used']:,}{of} ids occur")
    exponent = vocabulary["zipf_exponent"]
    if exponent is not None:
        # Centred on the curve over the fitted ranks, to show where frequencies deviate from Zipf's law.
        inside = [(rank, count) for rank, count in vocabulary["frequencies"] if 10 <= rank <= 10_000]
        level = sum(math.log(count) + exponent * math.log(rank) for rank, count in inside) / len(inside)
        line = [math.exp(level) * rank**-exponent for rank in ranks]
        axis.plot(ranks, line, color=color, linestyle=":", linewidth=1, label=f"rank$^{{-{exponent:.2f}}}$ (Zipf)")


def _label_frequencies(axis: Axes) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylim(bottom=0.8)
    axis.set_xlabel("rank of the token id by frequency")
    axis.set_ylabel("occurrences")
    axis.set_title("Frequency of token ids")
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=9)
