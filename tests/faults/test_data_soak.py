"""Short runs of the soak program: preprocessing that is killed at random makes the same dataset, byte for byte."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from project import ROOT, SHARED

PROGRAM = ROOT / "tests" / "soak" / "soak_preprocess.py"


def soak(*words: object) -> dict[str, int]:
    command = [sys.executable, str(PROGRAM), "--json", *map(str, words)]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    tally: dict[str, int] = json.loads(result.stdout)
    return tally


@pytest.mark.fault("preprocess")
@pytest.mark.slow
def test_random_faults_leave_no_trace() -> None:
    tally = soak("--seconds", 1, "--megabytes", 20, "--faults", 6)
    assert tally["rounds"] >= 1
    assert tally["runs"] > tally["rounds"]


@pytest.mark.fault("preprocess")
@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared corpora; set TACO_SHARED_DATA")
def test_every_corpus_with_one_and_two_workers_killed_twice() -> None:
    """Two datasets of all corpora together, English, Chinese and Japanese: one with each number of workers."""
    vocab = SHARED / "vocab" / "bert-base-uncased" / "vocab.txt"
    tally = soak("--input", SHARED / "corpus", "--tokenizer", vocab, "--kills", 2, "--workers", 1, 2, "--rounds", 2)
    assert tally["rounds"] == 2
    assert tally["tool_kills"] >= 4
    assert tally["tokens"] > 35_000_000
