"""Holds every layout of `layouts.py` against one plain process, and writes the table in docs/parallelism.md.

    make parity                     a few minutes on two cores

Prints every case as it ends, with its deviations; exit code 1 if one is beyond its limit, and then nothing is written.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from importlib import metadata
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "helpers")]

import conftest  # noqa: E402, F401  # one thread per process, and the CPU
import megatron.core.tensor_parallel  # noqa: E402, F401  # before the ranks fork
import torch  # noqa: E402
from layouts import (  # noqa: E402
    DROPPING_GRIDS,
    GRIDS,
    NUM_LAYERS,
    PLAIN,
    Case,
    Grid,
    all_cases,
    cases_of,
    dropping_cases,
)
from parity import (  # noqa: E402
    LIMITS,
    STEPS,
    Deviation,
    References,
    compare,
    draw_same_pairs,
    find_references,
    layout_outcomes,
)

PAGE = TESTS.parent / "docs" / "parallelism.md"
BEGIN = "<!-- begin of what `make parity` writes -->"
END = "<!-- end of what `make parity` writes -->"
LINE_LENGTH = 127
HEAD = (
    "| layout | ZeRO | recomputed layers | precision | setting | MLM loss | contrastive loss | "
    "gradient norm | weights |\n|---|---|---|---|---|---|---|---|---|"
)

Row = tuple[Grid, int, str, str]
"""Cases that differ only in what is computed again share a row of the table."""


def main() -> int:
    """Run all cases; the exit code."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        references = find_references(folder)
        found = dict(_run_all(folder, references))
        same_bits = [grid for grid in DROPPING_GRIDS if _is_same_to_the_bit(folder, grid)]
    far = [case for case, deviation in found.items() if not deviation.is_within(LIMITS[case.precision])]
    far_grids = [grid for grid in DROPPING_GRIDS if grid not in same_bits]
    if far or far_grids or len(found) < len(all_cases()):
        print(
            f"not written: {len(far)} cases are beyond their limits, {len(all_cases()) - len(found)} drew other pairs,"
        )
        print(f"{len(far_grids)} grids change bits when they compute layers again:")
        print("\n".join(str(failed) for failed in (*far, *far_grids)))
        return 1
    in_bf16 = compare([references.in_bf16], references.plain[PLAIN], references.initial)
    write(PAGE, describe(found, same_bits, in_bf16))
    print(f"{len(found)} cases in {time.monotonic() - start:.0f} s; the table is in {PAGE}")
    return 0


def _run_all(folder: Path, references: References) -> Iterator[tuple[Case, Deviation]]:
    """Every case with its deviation, those that draw other pairs left out."""
    for number, grid in enumerate(GRIDS, start=1):
        cases = cases_of(grid)
        print(f"[{number}/{len(GRIDS)}] {grid}: {len(cases)} cases", flush=True)
        for case, ranks in zip(cases, layout_outcomes(folder, cases), strict=True):
            deviation = compare(ranks, references.of(case), references.initial)
            figures = ", ".join(f"{field.name} {getattr(deviation, field.name):.1e}" for field in fields(deviation))
            print(f"  {case}: {figures}", flush=True)
            if draw_same_pairs(ranks, references.of(case)):
                yield case, deviation
            else:
                print(f"  {case}: other pairs")


def _is_same_to_the_bit(folder: Path, grid: Grid) -> bool:
    """True where computing layers again, with dropout on, changes no bit of figures and weights."""
    print(f"{grid}: layers computed again, with dropout", flush=True)
    kept, *recomputed = layout_outcomes(folder, dropping_cases(grid))
    return all(
        rank.figures == expected.figures
        and all(torch.equal(rank.weights[name], weight) for name, weight in expected.weights.items())
        for ranks in recomputed
        for rank, expected in zip(ranks, kept, strict=True)
    )


# -- the page ----------------------------------------------------------------------------------------------------------


def describe(found: dict[Case, Deviation], same_bits: Sequence[Grid], in_bf16: Deviation) -> str:
    """The table, and what it was measured on, as Markdown; `in_bf16` is how far one bf16 process is from fp32."""
    rows: dict[Row, list[Case]] = {}
    for case in found:
        rows.setdefault(row_of(case), []).append(case)
    lines = [_row(cases, [found[case] for case in cases]) for _, cases in sorted(rows.items(), key=_order)]
    return "\n".join(
        [
            _filled(f"{len(found)} cases of {STEPS} steps and an evaluation. {_limits()} {_precision(in_bf16)}"),
            "",
            HEAD,
            *lines,
            "",
            _filled(
                "With dropout on, recomputing layers changes no bit of losses, gradient norms and weights in: "
                f"{', '.join(str(grid) for grid in same_bits)}."
            ),
            "",
            _filled(f"{_machine()}."),
        ]
    )


def row_of(case: Case) -> Row:
    """The row that a case belongs to."""
    return case.grid, case.zero, case.precision, case.setting


def label(row: Row) -> tuple[str, str, str, str]:
    """What the table says of a row: layout, ZeRO, precision, setting."""
    grid, zero, precision, setting = row
    runs_as = " (runs as 1)" if grid.pipeline > 1 and zero == 0 else ""
    return str(grid), f"{zero}{runs_as}", precision, "" if setting == PLAIN else setting


def write(page: Path, text: str) -> None:
    """Put `text` between the markers of `page`."""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def _order(item: tuple[Row, list[Case]]) -> tuple[bool, str, int, int]:
    """fp32 in the usual setting first, then bf16, then the other settings."""
    grid, zero, precision, setting = item[0]
    return setting != PLAIN, "" if setting == PLAIN and precision == "fp32" else precision, GRIDS.index(grid), zero


def _row(cases: Sequence[Case], deviations: Sequence[Deviation]) -> str:
    layout, zero, precision, setting = label(row_of(cases[0]))
    names = {0: "none", "all": "all"}
    recomputed = ", ".join(names.get(case.recompute, f"{case.recompute} of {NUM_LAYERS}") for case in cases)
    kinds = ("mlm_loss", "contrastive_loss", "grad_norm", "weights")
    figures = [f"{max(getattr(deviation, kind) for deviation in deviations):.1e}" for kind in kinds]
    return f"| {' | '.join((layout, zero, recomputed, precision, setting, *figures))} |"


def _filled(text: str) -> str:
    return textwrap.fill(text, LINE_LENGTH, break_on_hyphens=False)


def _limits() -> str:
    fp32, bf16 = LIMITS["fp32"], LIMITS["bf16"]
    return (
        "Unless a setting is named: rows of a stream, all tokens anchors, AdamW, no dropout. "
        f"Limits in fp32: {fp32.mlm_loss:g} everywhere. Limits in bf16: MLM loss {bf16.mlm_loss:g}, contrastive loss "
        f"{bf16.contrastive_loss:g}, gradient norm {bf16.grad_norm:g}, weights {bf16.weights:g} and, in the mean "
        f"square, {bf16.weights_of_way:g} of their distance from the initial ones."
    )


def _precision(in_bf16: Deviation) -> str:
    return (
        f"One process in bf16 deviates from fp32 by {in_bf16.mlm_loss:.1%} (MLM loss) and "
        f"{in_bf16.contrastive_loss:.1%} (contrastive loss): g = h - e is a small difference of large numbers at the "
        "start of training."
    )


def _machine() -> str:
    model = next(
        (line.split(":")[1].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")),
        platform.machine(),
    )
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "deepspeed", "megatron-core"))
    return f"{model}, {os.cpu_count()} cores, gloo; Python {platform.python_version()}, {packages}"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    sys.exit(main())
