"""Progress says share, time left and speed: on a line now and then, or in what room a terminal has."""

from __future__ import annotations

import io
import re
import sys
import time
from pathlib import Path

import pytest
from corpora import write_jsonl, write_vocab

from data_tools import progress
from data_tools.encoding.encode import EncodeOptions
from data_tools.preprocess import preprocess
from data_tools.progress import PatientLine, ProgressMeter
from data_tools.readers import hub
from data_tools.vocabulary.text_sample import draw_sample

WORDS = ("35.8 MB/s", "7,877,319 tokens/s", "1,254.5 MB", "10,002 documents", "11,982,972 tokens")


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def first_lines(stream: io.StringIO) -> str:
    """What another thread prints, once it ends with a line. (`capsys` would lose what is printed while it is read.)"""
    while not stream.getvalue().endswith("\n"):
        time.sleep(0.001)
    return stream.getvalue()


def test_a_long_document_is_told_to_take_long(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    """In a thread: the program itself is busy with one document and reports nothing."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LOOKS", 0.01)
    with ProgressMeter("tokenising", 1000) as meter:
        meter.update(100, "a word")
        clock.now += 35
        printed = first_lines(stream)
    assert printed == "tokenising: 10 %, at the same place for 35 s, ETA 315 s, a word\n"


def test_a_library_that_reports_nothing_is_said_to_be_at_work(monkeypatch: pytest.MonkeyPatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.01)
    with PatientLine("learning 9 pieces", lambda: "40% of the text read"):
        printed = first_lines(stream)
    assert printed.startswith("learning 9 pieces: 40% of the text read, 0 s so far\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_lines_come_every_few_seconds_with_share_and_time_left(clock: Clock, capsys: pytest.CaptureFixture[str]):
    with ProgressMeter("tokenising", 1000, done_bytes=200) as meter:
        meter.update(300, *WORDS)  # too early for a line
        clock.now += 10
        meter.update(400, *WORDS)
        clock.now += 1
        meter.update(500, *WORDS)
        clock.now += 5000
        meter.update(600, *WORDS)
    lines = capsys.readouterr().err.splitlines()
    # 200 bytes of this run took 10 seconds, so 600 more take 30; then 400 in 5,011 seconds.
    assert lines == [
        f"tokenising: 40 %, ETA 30 s, {', '.join(WORDS)}",
        f"tokenising: 60 %, ETA 1 h 23 min, {', '.join(WORDS)}",
    ]


def test_nothing_is_guessed_where_the_size_is_not_known(clock: Clock, capsys: pytest.CaptureFixture[str]):
    with ProgressMeter("tokenising", 0) as meter:
        clock.now += 10
        meter.update(400, *WORDS)
    assert capsys.readouterr().err == f"tokenising: {', '.join(WORDS)}\n"


@pytest.mark.parametrize(
    ("width", "total", "last"),
    [
        (80, 1000, "100% ETA 0 s, 35.8 MB/s, 7,877,319 tokens/s"),
        (200, 1000, f"100% ETA 0 s, {', '.join(WORDS)}"),
        (30, 1000, "100% ETA 0 s"),
        (80, 0, "\u2501 35.8 MB/s, 7,877,319 tokens/s, 1,254.5 MB"),
    ],
)
def test_a_terminal_shows_what_matters_first(monkeypatch: pytest.MonkeyPatch, width: int, total: int, last: str):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", str(width))
    with ProgressMeter("tokenising", total) as meter:
        meter.update(1000, *WORDS)
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue()))
    shown = [line for line in lines if line.strip()][-1]
    assert max(map(len, lines)) <= width
    if width >= 80:
        assert shown.startswith("tokenising ")
        assert shown.rstrip().endswith(last)


def test_an_input_that_does_not_tell_its_size_takes_the_share_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    totals: list[int] = []
    original = ProgressMeter.__init__

    def note(self: ProgressMeter, title: str, total_bytes: int, done_bytes: int = 0) -> None:
        totals.append(total_bytes)
        original(self, title, total_bytes, done_bytes)

    monkeypatch.setattr(ProgressMeter, "__init__", note)
    monkeypatch.setattr(hub, "load_stream", lambda *name: [{"text": "a cat"}])
    path, options = write_jsonl(tmp_path / "x.jsonl", ["the cat"]), EncodeOptions(str(write_vocab(tmp_path)))
    for name, inputs in (("a", [str(path)]), ("b", [str(path), "hf://cats"])):
        preprocess(inputs, options, str(tmp_path / name))
        draw_sample(inputs, options.reading, hash_range=options.hash_range, sample_bytes=None, max_documents=None)
    assert totals == [path.stat().st_size, path.stat().st_size, 0, 0]
