"""Runs every test that injects a fault, and writes the table of docs/reliability.md from what the tests recorded.

    make reliability                                              about ten minutes on two cores
    python tests/faults/reliability_table.py --records FILE ...   from the records of a run of pytest

Exit code 1 if a test failed or a fault was not survived, and then nothing is written.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "helpers")]

from fault_records import CATALOGUE, FaultRecord, read_records  # noqa: E402

PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- faults: written by make reliability -->", "<!-- end of faults -->"
HEAD = (
    "| what goes wrong | what happens | injected | survived | steps lost, at most | seconds to recover |\n"
    "|---|---|---|---|---|---|"
)


def main() -> int:
    """Run the tests, or take what they left, and write the page; the exit code."""
    parser = argparse.ArgumentParser(description="write the table of docs/reliability.md")
    parser.add_argument("--records", type=Path, nargs="+", help="records of tests that have run already")
    paths = parser.parse_args().records
    with tempfile.TemporaryDirectory() as folder:
        if paths is None:
            paths = [Path(folder) / "records.jsonl"]
            if code := run_tests(paths[0]):
                return code
        # Of a test that ran twice the last run counts.
        latest = {record.test: path for path in paths for record in read_records(path)}
        records = [record for path in paths for record in read_records(path) if latest[record.test] == path]
    lost = [record for record in records if record.survived < record.injected]
    if lost:
        print("not written; not survived:", *(record.test for record in lost), sep="\n  ")
        return 1
    write(describe(records))
    print(f"{sum(record.injected for record in records)} faults; the table is in {PAGE}")
    return 0


def run_tests(path: Path) -> int:
    """Every marked test but those of minutes; the exit code of pytest."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", "-m", "fault and not soak"]
    environment = {**os.environ, "TACO_FAULT_RECORDS": str(path)}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def describe(records: Sequence[FaultRecord]) -> str:
    """The table, and what it was counted on, as Markdown."""
    rows = [_row(name, [record for record in records if record.fault == name]) for name in CATALOGUE]
    injected, tests = sum(record.injected for record in records), len({record.test for record in records})
    counted = f"{injected} faults in {tests} tests, {os.cpu_count()} cores, gloo; all survived."
    return "\n".join([HEAD, *filter(None, rows), "", counted])


def _row(name: str, records: Sequence[FaultRecord]) -> str | None:
    """One line of the table; None for a fault that nobody has injected."""
    if not records:
        return None
    lost = [record.lost_steps for record in records if record.lost_steps is not None]
    seconds = [record.recovery_seconds for record in records if record.recovery_seconds is not None]
    cells = (
        *CATALOGUE[name],
        str(sum(record.injected for record in records)),
        str(sum(record.survived for record in records)),
        str(max(lost)) if lost else "",
        f"{statistics.median(seconds):.1f} (at most {max(seconds):.1f})" if seconds else "",
    )
    return f"| {' | '.join(cells)} |"


def write(text: str) -> None:
    """Put the table between its marks."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
