"""Datasets under attack: whatever is done to their files, they open with the right tokens or are refused with words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hostile_files import CORPORA, KINDS, VALUES, Mutation, attack, plain_read, sound_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from project import ROOT

IN_TMP = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
mutations = st.lists(
    st.builds(Mutation, st.sampled_from(KINDS), st.integers(0, 999), st.sampled_from(VALUES)), min_size=1, max_size=3
)


def run_campaign(folder: Path, num_cases: int, *flags: str) -> str:
    program = ROOT / "tests" / "helpers" / "hostile_files.py"
    command = [sys.executable, *flags, str(program), str(folder), str(num_cases), "7"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("corpus", range(len(CORPORA)))
def test_sound_files_open_with_what_they_hold(tmp_path: Path, corpus: int) -> None:
    assert attack(tmp_path, corpus, [])
    expected = [[token for sequence in document for token in sequence] for document in CORPORA[corpus][0]]
    assert plain_read(*sound_files(corpus)) == expected


@pytest.mark.fault("data-index")
@settings(IN_TMP, max_examples=500)
@given(corpus=st.integers(0, len(CORPORA) - 1), mutations=mutations)
def test_damage_is_refused_or_harmless(tmp_path: Path, corpus: int, mutations: list[Mutation]) -> None:
    attack(tmp_path, corpus, mutations)


@pytest.mark.fault("data-index")
@pytest.mark.soak
@settings(IN_TMP, max_examples=20_000)
@given(corpus=st.integers(0, len(CORPORA) - 1), mutations=mutations)
def test_damage_is_refused_or_harmless_at_length(tmp_path: Path, corpus: int, mutations: list[Mutation]) -> None:
    attack(tmp_path, corpus, mutations)


@pytest.mark.fault("data-index")
def test_every_flipped_bit_is_refused_or_moves_a_document(tmp_path: Path) -> None:
    """Without a manifest, which has a hash, borders between documents are the one thing that a bit can move."""
    num_bits = len(sound_files(0)[0]) * 8
    opened = [bit for bit in range(num_bits) if attack(tmp_path, 0, [Mutation("flip", bit // 8, bit % 8)])]
    assert opened
    assert all(bit // 8 >= 34 + 12 * 7 for bit in opened)


@pytest.mark.fault("data-index")
def test_damage_costs_no_memory_and_needs_no_assertions(tmp_path: Path) -> None:
    """64 MiB more than an interpreter that has read a dataset: a hostile count that was believed would end this."""
    assert run_campaign(tmp_path, 2_000, "-O").endswith("assertions off\n")


@pytest.mark.soak
@pytest.mark.parametrize("flags", [[], ["-O"]])
def test_damage_costs_no_memory_at_length(tmp_path: Path, flags: list[str]) -> None:
    assert run_campaign(tmp_path, 20_000, *flags).startswith("20000 cases, ")
