"""Workers killed and stopped, a second pass cut off, little memory: the dataset is that of an undisturbed run."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from corpora import write_jsonl, write_vocab
from project import ROOT

from data_tools.encoding import encode, worker_pool
from data_tools.encoding.encode import EncodeOptions
from data_tools.output import duplicates, resumable
from data_tools.preprocess import preprocess
from data_tools.readers import ReadOptions
from pretrain.data.dataset.verification import verify
from pretrain.errors import TacoError

TEXTS = [f"the cat sat on mat {'abcdefghij'[i % 10]} {'sat ' * (i % 17)}" for i in range(600)]


def run(folder: Path, name: str, **how: Any) -> dict[str, bytes]:
    path = folder / "x.jsonl"
    if not path.exists():
        write_jsonl(path, TEXTS)
    options = EncodeOptions(str(write_vocab(folder)), reading=ReadOptions(chunk_bytes=1000))
    preprocess([str(path)], options, str(folder / name), **how)
    assert verify(folder / name) == []
    assert sorted(path.name for path in folder.glob(f"{name}*")) == [
        f"{name}{suffix}" for suffix in (".bin", ".idx", ".json", ".tokenizer")
    ]
    return {suffix: (folder / f"{name}{suffix}").read_bytes() for suffix in (".bin", ".idx")}


def after_chunks(patch: pytest.MonkeyPatch, numbers: set[int], action: Callable[[], None]) -> None:
    """Has `action` done after some of the chunks that a run takes in."""
    original, done = resumable.ResumableRun.append, 0

    def append(*arguments: Any) -> None:
        nonlocal done
        original(*arguments)
        done += 1
        if done in numbers:
            action()

    patch.setattr(resumable.ResumableRun, "append", append)


def worker_signaller(number: int) -> Callable[[], None]:
    """Sends `number` to another worker at every call: one that was killed takes a moment to end."""
    signalled: set[int] = set()

    def send() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            living = [c for c in psutil.Process().children() if c.status() != psutil.STATUS_ZOMBIE]
            fresh = [child.pid for child in living if child.pid not in signalled]
            if fresh:
                signalled.add(fresh[0])
                return os.kill(fresh[0], number)
        raise AssertionError("no worker lives")

    return send


@pytest.mark.slow
@pytest.mark.fault("preprocess")
@pytest.mark.parametrize(("number", "moments"), [(signal.SIGKILL, {1, 5, 10}), (signal.SIGSTOP, {3})])
def test_killed_and_stopped_workers_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: int, moments: set[int]
) -> None:
    whole = run(tmp_path, "whole")
    monkeypatch.setattr(worker_pool, "_IDLE_SECONDS", 1.5)
    monkeypatch.setattr(encode, "_GROUP_CHUNKS", 1)
    after_chunks(monkeypatch, moments, worker_signaller(number))
    assert run(tmp_path, "out", workers=2) == whole
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: worker process")]
    assert len(warnings) >= len(moments)
    assert ("was killed by SIGKILL" if number == signal.SIGKILL else "did nothing for") in warnings[0]
    assert not psutil.Process().children()


@pytest.mark.slow
@pytest.mark.fault("preprocess")
def test_a_chunk_that_kills_every_worker_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_tools.encoding.encode.make_group_encoder", deadly)
    with pytest.raises(TacoError, match=r"x.jsonl .chunks? [\d to]+, up to byte \d+ on disk.: 3 workers died over it"):
        run(tmp_path, "out", workers=2)
    assert not list(tmp_path.glob("out*"))


def deadly(options: EncodeOptions) -> Callable[[Any], Any]:
    return lambda chunk: os._exit(1)


@pytest.mark.fault("preprocess")
def test_a_second_pass_that_is_cut_off_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path, "whole", dedup=True)
    original = duplicates.copy_unique

    def fail(*arguments: Any, **options: Any) -> Any:
        original(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resumable, "copy_unique", fail)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, "out", dedup=True)
    assert (tmp_path / "out.raw.bin.tmp").exists()
    assert not (tmp_path / "out.json").exists()
    assert run(tmp_path, "out", dedup=True, workers=2) == whole


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, workers: int) -> None:
    """Under a limit that each process must keep, and with the same peak for a corpus four times as large."""
    vocab, line = write_vocab(tmp_path), b'{"text": "' + b"the cat sat on a mat and " * 40 + b'"}\n'
    limit, peaks = 400 << 20, []
    for name, megabytes in (("small", 30), ("large", 120)):
        (tmp_path / f"{name}.jsonl").write_bytes(line * (megabytes * 1_000_000 // len(line)))
        measured = [sys.executable, ROOT / "tests/helpers/with_peak_memory.py", tmp_path / "peak"]
        words = ["--input", tmp_path / f"{name}.jsonl", "--tokenizer", vocab, "--output-prefix", tmp_path / name]
        words += ["--workers", workers, "--memory", "32M"]
        done = subprocess.run(
            [*measured, sys.executable, "-m", "pretrain.cli", "data", "preprocess", *map(str, words)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int((tmp_path / "peak").read_text()))
    assert peaks[1] < peaks[0] + 20e6, peaks  # the text alone grew by 90 MB
