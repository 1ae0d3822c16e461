"""What every test shares: one thread, the CPU, no network; a small corpus and a small run to start from."""

from __future__ import annotations

import os
import signal

# Before torch or DeepSpeed is imported anywhere: several processes share few cores, and no test takes a GPU by chance.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from fault_records import PROPERTY, FaultRecord, FaultRecorder, names_of, note_outcome, write_records


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> FaultRecorder:
    """Notes faults that the test injected; see helpers/fault_records.py."""
    return FaultRecorder(request.node)


@pytest.fixture
def hangup_is_heard() -> Iterator[None]:
    """SIGHUP reaches the processes of a test, also where the tests run under nohup, which would let them ignore it."""
    before = signal.getsignal(signal.SIGHUP)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        names_of(item)
        if "fault" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.fault)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    if call.when == "call" and not (call.excinfo and call.excinfo.errisinstance(pytest.skip.Exception)):
        note_outcome(item, passed=call.excinfo is None)
    return (yield)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # workers of pytest-xdist hand their reports to the process that has none
        config.pluginmanager.register(_FaultTally(config))


class _FaultTally:
    """Collects the records of all tests, and tells them at the end."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._records: list[FaultRecord] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            found = [value for name, value in report.user_properties if name == PROPERTY]
            self._records += [FaultRecord(**value) for value in found]  # type: ignore[arg-type]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self._records:
            return
        cache = self._config.cache
        assert cache is not None
        path = Path(os.environ.get("TACO_FAULT_RECORDS") or cache.mkdir("faults") / "records.jsonl")
        write_records(path, self._records)
        injected, survived = (sum(getattr(r, name) for r in self._records) for name in ("injected", "survived"))
        terminalreporter.write_line(f"faults: {injected} injected, {survived} survived; {path}")
