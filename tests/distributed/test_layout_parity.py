"""Layouts that four processes can hold against one plain process: losses, gradient norms, pairs and final weights.

The layouts are those of `layouts.py`; `parity_table.py` runs all of them and writes the table in the documentation.
Cases of one grid run one after another in the same processes.
"""

from __future__ import annotations

from pathlib import Path

import parity_table
import pytest
import torch
from layouts import DROPPING_GRIDS, GRIDS, Grid, all_cases, cases_of, dropping_cases, is_left_to_the_table
from parity import LIMITS, STEPS, References, compare, draw_same_pairs, find_references, layout_outcomes, load

pytestmark = pytest.mark.slow  # importing megatron-core alone takes seconds


@pytest.fixture(scope="module", autouse=True)
def _import_megatron_once() -> None:
    import megatron.core.tensor_parallel  # noqa: F401  # before the ranks fork


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def references(folder: Path) -> References:
    return find_references(folder)


TESTED_GRIDS = [grid for grid in GRIDS if not all(is_left_to_the_table(case) for case in cases_of(grid))]


@pytest.mark.parametrize("grid", TESTED_GRIDS, ids=str)
def test_layouts_equal_one_plain_process(grid: Grid, folder: Path, references: References) -> None:
    cases = [case for case in cases_of(grid) if not is_left_to_the_table(case)]
    far = {}
    for case, ranks in zip(cases, layout_outcomes(folder, cases), strict=True):
        expected = references.of(case)
        deviation = compare(ranks, expected, references.initial)
        if not deviation.is_within(LIMITS[case.precision]):
            far[str(case)] = str(deviation)
        if not draw_same_pairs(ranks, expected):
            far[str(case)] = "other pairs"
    assert not far


@pytest.mark.parametrize("grid", [grid for grid in DROPPING_GRIDS if grid.num_processes < 4], ids=str)
def test_computing_layers_again_changes_no_bit_with_dropout(grid: Grid, folder: Path) -> None:
    cases = dropping_cases(grid)
    kept, *recomputed = layout_outcomes(folder, cases)
    for case, ranks in zip(cases[1:], recomputed, strict=True):
        for rank, expected in zip(ranks, kept, strict=True):
            assert rank.figures == expected.figures
            assert rank.weights.keys() == expected.weights.keys()
            assert all(torch.equal(rank.weights[name], weight) for name, weight in expected.weights.items())
        num_attentions = [sum(rank.num_attentions for rank in each) for each in (kept, ranks)]
        assert (num_attentions[1] > num_attentions[0]) == (case.recompute != "elementwise")


def test_clipping_is_active_in_every_step(folder: Path, references: References) -> None:
    limit = load(folder).optim.clip_grad_norm
    for reference in (*references.plain.values(), references.in_bf16):
        assert all(norm > limit for *_, norm in reference.figures[:STEPS])


def test_settings_differ_where_they_should(references: References) -> None:
    """A setting that changed nothing would be compared with itself."""
    figures = [tuple(reference.figures) for reference in references.plain.values()]
    assert len(set(figures)) == len(figures)


def test_most_cases_are_tested() -> None:
    cases = all_cases()
    assert len(set(cases)) == len(cases)
    assert sum(is_left_to_the_table(case) for case in cases) < len(cases) / 2


def test_the_documentation_has_a_row_for_every_case() -> None:
    text = parity_table.PAGE.read_text(encoding="utf-8").split(parity_table.BEGIN)[1].split(parity_table.END)[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    found = [(layout, zero, precision, setting) for layout, zero, _, precision, setting, *_ in rows[1:]]
    assert sorted(found) == sorted({parity_table.label(parity_table.row_of(case)) for case in all_cases()})
