"""The page of a run: one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

from pretrain.report.curves import PARTS, Record, series

PAGE_FILE = "report.html"

# Label, field of a record, and how its median is shown.
_SPEED: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("tokens per second", "tokens_per_second", "{:,.0f}".format),
    ("real tokens per second", "real_tokens_per_second", "{:,.0f}".format),
    ("model TFLOP/s per device", "model_tflops", "{:.4g}".format),
    ("hardware TFLOP/s per device", "hardware_tflops", "{:.4g}".format),
    ("MFU: model operations over the GPU's dense peak", "mfu", "{:.1%}".format),
    ("HFU: hardware operations over it", "hfu", "{:.1%}".format),
    ("model operations over the measured matrix products", "mfu_of_matmul", "{:.1%}".format),
    ("hardware operations over them", "hfu_of_matmul", "{:.1%}".format),
    ("ms per step", "step_seconds", lambda seconds: f"{1e3 * seconds:.4g}"),
)


def read_descriptions(run: Path) -> dict[str, str]:
    """The text of the files that describe the run and its machine, by name, as far as they are there.

    Raises:
        DataError: one is there and cannot be read.
    """
    from pretrain.errors import DataError

    texts = {}
    for name in ("config.yaml", "env.json"):
        try:
            texts[name] = (run / name).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise DataError(f"{run / name}: cannot be read: {error.strerror or error}") from None
    return texts


def write_page(run: Path, records: Sequence[Record], picture: Path, descriptions: Mapping[str, str]) -> Path:
    """Write one self-contained HTML file with the picture, the last values and `descriptions`; returns its path."""
    from pretrain import durable

    image = base64.b64encode(picture.read_bytes()).decode("ascii")
    last: Record = {}
    for record in records:
        last |= record
    rows = "".join(
        f"<tr><td>{html.escape(k)}</td><td>{html.escape(_show(v))}</td></tr>" for k, v in sorted(last.items())
    )
    sections = "".join(f"<h2>{name}</h2><pre>{html.escape(text)}</pre>" for name, text in descriptions.items())
    page = (
        f"<!doctype html><meta charset='utf-8'><title>{html.escape(run.name)}</title>"
        "<style>body{font-family:sans-serif;max-width:75em;margin:2em auto;padding:0 1em}"
        "td{padding:.15em 1em .15em 0}pre{background:#f4f4f4;padding:1em;overflow:auto}img{max-width:100%}</style>"
        f"<h1>{html.escape(run.name)}</h1><img alt='curves of the run' src='data:image/png;base64,{image}'>"
        f"{_speed(records)}<h2>Last values</h2><table>{rows}</table>{sections}"
    )
    durable.write_text(run / PAGE_FILE, page)
    return run / PAGE_FILE


def _speed(records: Sequence[Record]) -> str:
    """A table of the run's speed, medians over its records, which leave out starts and other hiccups."""
    lines = [(label, show(median(values))) for label, name, show in _SPEED if (values := series(records, name)[1])]
    parts = {part: series(records, f"{part}_seconds")[1] for part in PARTS}
    means = {part: sum(values) / len(values) for part, values in parts.items() if values}
    if total := sum(means.values()):
        shares = ", ".join(f"{part} {100 * mean / total:.1f} %" for part, mean in means.items())
        lines.append(("where a step's time goes (means)", shares))
    if not lines:
        return ""
    rows = "".join(f"<tr><td>{html.escape(label)}</td><td>{html.escape(text)}</td></tr>" for label, text in lines)
    return f"<h2>Speed</h2><table>{rows}</table>"


def _show(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
