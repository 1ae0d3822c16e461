"""The page of a run: one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pretrain.report.curves import Record

PAGE_FILE = "report.html"


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
        f"<h2>Last values</h2><table>{rows}</table>{sections}"
    )
    durable.write_text(run / PAGE_FILE, page)
    return run / PAGE_FILE


def _show(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
