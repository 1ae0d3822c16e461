"""What tests of faults leave behind: which fault, how often it was injected and survived, what it cost.

A test says which fault it injects with `@pytest.mark.fault("kill")`, and counts once. One that injects several, or that
measures what they cost, takes the fixture `fault` and calls

    fault.record("kill", injected=3, survived=3, lost_steps=5, recovery_seconds=4.2)

Survived means that what `CATALOGUE` promises came true, to the bit where bits can be compared. Records travel with the
reports of the tests, so that they arrive whichever process of pytest-xdist ran them. At the end of a run of pytest all
of them lie in one file, a JSON object per line: that which TACO_FAULT_RECORDS names, or in pytest's cache.
`make reliability` makes the table of docs/reliability.md from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

PROPERTY = "fault"


class Fault(NamedTuple):
    """A row of the table: what goes wrong, and what happens then."""

    what: str
    then: str


# In the order of the table.
CATALOGUE = {
    "kill": Fault(
        "a rank is killed (SIGKILL) at a random step",
        "the other ranks end with one line each; the same command continues from the last checkpoint",
    ),
    "kill-in-save": Fault("a rank is killed at any moment of a save", "the previous checkpoint is intact and is used"),
    "power-loss": Fault(
        "the power fails at any moment of a save: what was not fsynced is lost, truncated or reordered",
        "every save that had returned is intact",
    ),
    "stop-signal": Fault(
        "SIGTERM, SIGINT, SIGHUP, SIGUSR1 or SIGUSR2 to one rank, to all, to their launcher, or to the job",
        "all ranks save the same step once and end with exit code 75; the same command continues",
    ),
    "second-signal": Fault(
        "another signal during the save", "an echo is ignored; a later one ends at once; nothing breaks"
    ),
    "hang": Fault("a rank is stopped, slow, or hangs", "it is named, or the run ends with every rank's stack"),
    "node": Fault("a node loses power, or does not see the data", "the job continues without it"),
    "full-disk": Fault(
        "the disk is full, or read-only, while a checkpoint is written",
        "every rank ends with the reason; earlier checkpoints stay, nothing incomplete is left",
    ),
    "logging": Fault(
        "the disk is full under metrics, TensorBoard events or log files",
        "reported once; training continues, to the same bits",
    ),
    "two-runs": Fault(
        "two runs in one folder", "the second is refused and the first is named; a dead run holds no lock"
    ),
    "latest": Fault("`latest` is empty, wrong or missing", "the newest good checkpoint is used anyway"),
    "damaged-checkpoint": Fault(
        "a file of a checkpoint is truncated, longer, or has one bit flipped",
        "found before loading; the checkpoint is set aside and the previous one used",
    ),
    "missing-shard": Fault("the file of one rank is missing", "all ranks reject that checkpoint together"),
    "unreadable": Fault(
        "a file of a run cannot be read: permissions, an I/O error, a link to what is not mounted",
        "one line that names it; nothing is set aside or trained again",
    ),
    "late-file": Fault(
        "a file of a checkpoint is not visible yet, or a checkpoint that was set aside is whole again",
        "waited for some seconds, and used",
    ),
    "foreign-checkpoint": Fault(
        "a checkpoint is renamed or of another run, or all are gone",
        "refused with both values, unless allowed; never counted, never removed, never a start from step 0",
    ),
    "no-good-checkpoint": Fault(
        "no checkpoint is good", "refused with a list; a start from step 0 only with --from-scratch"
    ),
    "other-layout": Fault(
        "other numbers of ranks, tensor and pipeline sizes, or ZeRO stage on resume",
        "the same weights and moments, bit for bit",
    ),
    "changed-run": Fault(
        "configuration or data differ from those of the run", "refused with the difference, unless allowed by key"
    ),
    "non-finite": Fault(
        "losses or gradients are NaN or infinite",
        "all ranks skip the same step and record its rows; too many in a row end the run with the last good state",
    ),
    "spike": Fault("the loss spikes", "a warning, a skipped step or a rollback, as configured"),
    "drift": Fault(
        "a bit of one replica's weights flips in memory",
        "parameter and ranks are named, nothing of it is saved; a restart repairs it",
    ),
    "data-size": Fault(
        "`.bin` is truncated, longer, empty or has a bit flipped", "refused with both sizes, or found by hash"
    ),
    "data-index": Fault(
        "`.idx` is damaged or malicious", "read exactly as the format says, or a typed error in bounded memory"
    ),
    "data-limits": Fault("datasets beyond 2^31 tokens, 2^32 bytes, 2^31 documents", "correct offsets at every limit"),
    "index-race": Fault("four processes build one index table; the builder dies", "built once, never seen incomplete"),
    "input-lines": Fault(
        "bad lines, bad UTF-8, extreme sizes in a corpus", "named by file and line, or counted and listed"
    ),
    "archives": Fault(
        "compressed files are truncated, damaged or bombs", "an error that names the file, in bounded memory"
    ),
    "preprocess": Fault(
        "preprocessing, or its worker, is killed or stopped; its disk is full",
        "the same command continues; every byte as in an undisturbed run",
    ),
    "tokenizer": Fault("a tokenizer that is not the data's", "refused at the start, by hash and by the largest id"),
    "bad-config": Fault(
        "wrong keys and values, impossible sizes", "exit code 2 before any rank waits, with the nearest valid value"
    ),
    "degenerate-batch": Fault(
        "no masked token, no pair, rows of padding, a micro-batch of one row",
        "refused at the start, or a defined loss; never NaN",
    ),
    "clock": Fault("the clock jumps", "no effect: durations come from monotonic clocks"),
    "port": Fault("the port is taken; two runs on one machine", "one line that names the port; both runs finish"),
    "memory": Fault("memory runs out", "one line with what the run needs per rank, and how to reduce it"),
    "export": Fault(
        "export is killed, or its disk is full",
        "no incomplete folder that loads; the older export stays, or the next one takes it back",
    ),
    "malicious": Fault("files that would run code, or lead out of their folder", "refused; none of their code runs"),
    "shell": Fault("shell characters and line breaks in names given to job scripts", "treated as names"),
    "job": Fault(
        "a SLURM job crashes repeatedly, is cancelled, or is submitted twice",
        "it ends, or stays ended, with the reason",
    ),
}


@dataclass(frozen=True)
class FaultRecord:
    """Faults of one kind that one test injected; what they cost at most, where it was measured."""

    fault: str
    test: str
    injected: int
    survived: int
    lost_steps: int | None = None
    recovery_seconds: float | None = None


class FaultRecorder:
    """What a test has to say about the faults that it injected."""

    def __init__(self, item: pytest.Item) -> None:
        self._item = item

    def record(
        self,
        fault: str,
        *,
        injected: int,
        survived: int,
        lost_steps: int | None = None,
        recovery_seconds: float | None = None,
    ) -> None:
        """Note faults of one kind; steps that were trained again, and seconds from the restart to the first new step.

        Raises:
            KeyError: `CATALOGUE` knows no such fault.
        """
        CATALOGUE[fault]
        record = FaultRecord(fault, self._item.nodeid, injected, survived, lost_steps, recovery_seconds)
        self._item.user_properties.append((PROPERTY, asdict(record)))


def names_of(item: pytest.Item) -> list[str]:
    """The faults that a test is marked with.

    Raises:
        pytest.UsageError: `CATALOGUE` knows no such fault.
    """
    names = [str(name) for mark in item.iter_markers("fault") for name in mark.args]
    unknown = [name for name in names if name not in CATALOGUE]
    if unknown:
        raise pytest.UsageError(
            f"{item.nodeid}: unknown fault {unknown[0]!r}; tests/helpers/fault_records.py lists them"
        )
    return names


def note_outcome(item: pytest.Item, *, passed: bool) -> None:
    """Count a marked test that has recorded nothing itself as one fault, survived if it passed."""
    recorded = {value["fault"] for name, value in item.user_properties if name == PROPERTY}  # type: ignore[index]
    for name in names_of(item):
        if name not in recorded:
            FaultRecorder(item).record(name, injected=1, survived=int(passed))


def write_records(path: Path, records: Iterable[FaultRecord]) -> None:
    """Replace `path` by the records, one JSON object per line, in the order of the tests' names."""
    lines = sorted(json.dumps(asdict(record)) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_records(path: Path) -> list[FaultRecord]:
    """What `write_records` wrote."""
    return [FaultRecord(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
