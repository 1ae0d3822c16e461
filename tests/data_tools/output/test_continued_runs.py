"""Runs killed at any moment, any number of times, give the dataset of a run that was not; never a wrong one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from continued_runs import assert_same, command, complete, finish, leftovers, run, start, wait_for, write_corpus
from corpora import write_jsonl, write_vocab
from project import ROOT

from data_tools.encoding.encode import EncodeOptions
from data_tools.output.journal import Journal, RunState
from data_tools.preprocess import preprocess
from data_tools.readers import ReadOptions
from pretrain.data.dataset.dataset_writer import WriterState
from pretrain.data.dataset.manifest import Dropped
from pretrain.data.dataset.verification import verify
from pretrain.errors import DataError


@pytest.mark.fault("preprocess")
@pytest.mark.slow
def test_killed_at_any_moment_and_continued_with_other_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAUSE_PER_CHUNK", "0.02")  # or a fast machine is done before it is killed
    inputs = write_corpus(tmp_path)
    seconds = complete(tmp_path, inputs)
    moments, kills, continued = random.Random(11), 0, 0
    for number in range(4):
        name = f"out{number}"
        for attempt in range(40):
            workers = moments.choice([0, 1, 2, 3])
            program = start(command(inputs, tmp_path, name, "--workers", workers))
            try:
                _, errors = program.communicate(timeout=moments.uniform(0.3, 1.2) * seconds * (1 + attempt / 10))
            except subprocess.TimeoutExpired:
                program.kill()
                _, errors = program.communicate()
                kills += 1
                continued += "continuing an unfinished run" in errors
                if (tmp_path / f"{name}.json").exists() and not (tmp_path / f"{name}.journal").exists():
                    break  # it had finished
                continue
            assert program.returncode == 0, errors
            break
        assert_same(tmp_path, name, "whole")
    assert kills >= 4
    assert continued >= 1


@pytest.mark.fault("preprocess")
@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGHUP, 75)])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.usefixtures("hangup_is_heard")
def test_a_signal_keeps_what_is_done(tmp_path: Path, number: int, code: int, workers: int) -> None:
    inputs = write_corpus(tmp_path, 10000)
    write_vocab(tmp_path)
    words = command(inputs, tmp_path, "out", "--workers", workers)
    program = start(words)
    wait_for(tmp_path / "out.journal", program)
    program.send_signal(number)
    _, errors = program.communicate(timeout=60)
    assert program.returncode == code, errors
    assert "the same command continues" in errors
    assert f"error: stopped by {signal.Signals(number).name}" in errors
    assert not (tmp_path / "out.json").exists()
    assert "continuing an unfinished run" in finish(command(inputs, tmp_path, "out", "--workers", 3 - workers))
    finish(command(inputs, tmp_path, "whole"))
    assert_same(tmp_path, "out", "whole")


# -- in this process: what an unfinished run may have left -------------------------------------------------------------


@pytest.fixture
def unfinished(tmp_path: Path) -> tuple[Path, list[str]]:
    """A folder with the dataset `whole` and the unfinished run `out`."""
    inputs = write_corpus(tmp_path, 150)
    run(tmp_path, inputs, "whole")
    run(tmp_path, inputs, "out", 4)
    assert not (tmp_path / "out.json").exists()
    return tmp_path, inputs


@pytest.mark.parametrize("chunks", [1, 2, 9, 14])
def test_every_cut_is_continued(tmp_path: Path, chunks: int, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = write_corpus(tmp_path, 150)
    run(tmp_path, inputs, "whole")
    run(tmp_path, inputs, "out", chunks)
    run(tmp_path, inputs, "out", 1)
    run(tmp_path, inputs, "out")
    assert "continuing an unfinished run" in capsys.readouterr().err
    assert_same(tmp_path, "out", "whole")


@pytest.mark.slow
def test_damage_goes_back_to_what_can_be_believed(unfinished: tuple[Path, list[str]]) -> None:
    folder, inputs = unfinished
    names = ["journal", "bin.tmp", "lengths.tmp", "documents.tmp", "rejects.jsonl.tmp"]
    kept = {name: (folder / f"out.{name}").read_bytes() for name in names}
    maker = random.Random(3)
    for number in range(24):
        for name, data in kept.items():
            (folder / f"out.{name}").write_bytes(data)
        victim = names[number % len(names)]
        data = bytearray(kept[victim])
        cut = maker.randrange(len(data) + 1)
        if victim in ("journal", "bin.tmp") and number % 2 and data:
            data[min(cut, len(data) - 1)] ^= 1 << maker.randrange(8)
        else:
            data = data[:cut] + (b"" if number % 3 else os.urandom(30))
        if number % 12 == 11:
            (folder / f"out.{victim}").unlink()
        elif victim in ("journal", "bin.tmp") or len(data) <= len(kept[victim]):
            (folder / f"out.{victim}").write_bytes(data)
        if victim in ("lengths.tmp", "documents.tmp", "rejects.jsonl.tmp") and number % 3 == 0:
            # Bytes behind what the journal vouches for are cut off; bytes before it are not hashed.
            (folder / f"out.{victim}").write_bytes(kept[victim] + os.urandom(30))
        run(folder, inputs, "out")
        assert_same(folder, "out", "whole")
        for suffix in (".bin", ".idx", ".json", ".rejects.jsonl"):
            (folder / f"out{suffix}").unlink()


@pytest.mark.fault("preprocess")
@pytest.mark.parametrize("step", range(8))
@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_while_the_dataset_is_put_in_place(tmp_path: Path, step: int, overwrite: bool) -> None:
    """The program is ended at each of the system calls by which files get their names."""
    inputs = write_corpus(tmp_path, 30)
    run(tmp_path, inputs, "whole")
    if overwrite:
        run(tmp_path, inputs[:1], "out")
    code = f"""
import os, sys
from pathlib import Path
calls = 0
def counting(original):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls > {step}:
            os._exit(9)
        return original(*arguments, **options)
    return call
from data_tools.output import resumable
announce = resumable.ResumableRun.announce
def begin(run, manifest):
    announce(run, manifest)
    Path.rename, Path.replace, Path.unlink = map(counting, (Path.rename, Path.replace, Path.unlink))
    os.replace, os.unlink, os.rmdir = map(counting, (os.replace, os.unlink, os.rmdir))
resumable.ResumableRun.announce = begin
import continued_runs
continued_runs.run(Path({str(tmp_path)!r}), {inputs!r}, "out", overwrite={overwrite})
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'helpers'}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    run(tmp_path, inputs, "out", overwrite=overwrite)
    assert_same(tmp_path, "out", "whole")


def test_another_run_is_not_continued(unfinished: tuple[Path, list[str]]) -> None:
    folder, inputs = unfinished
    options = EncodeOptions(str(folder / "vocab.txt"), reading=ReadOptions(on_error="skip", chunk_bytes=2048))
    cased = EncodeOptions(options.tokenizer, cased=True, reading=options.reading)
    other = EncodeOptions(options.tokenizer, reading=ReadOptions(on_error="skip", chunk_bytes=2048, json_key="id"))
    before = (folder / "out.journal").read_bytes()
    for changed, named, files in (
        (cased, "tokenizer: ", inputs),
        (other, "reading.json_key: 'text', now 'id'", inputs),
        (options, "order: ", inputs[::-1]),
        (options, "inputs.*b.jsonl.gz", inputs[:1]),
    ):
        with pytest.raises(DataError, match=f"unfinished run was started with other settings.*{named}.*--restart"):
            preprocess(files, changed, str(folder / "out"))
    assert (folder / "out.journal").read_bytes() == before
    os.utime(inputs[0], ns=(1, 1))
    with pytest.raises(DataError, match="a.jsonl"):
        run(folder, inputs, "out")
    run(folder, inputs, "out", restart=True)
    assert_same(folder, "out", "whole")


def test_a_mistake_may_be_skipped_without_starting_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["the cat sat " * 20] * 40)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:30], b"broken", *lines[30:]]))
    vocab = str(write_vocab(tmp_path))
    strict, lenient = (
        EncodeOptions(vocab, reading=ReadOptions(on_error=how, chunk_bytes=512))  # type: ignore[arg-type]
        for how in ("stop", "skip")
    )
    with pytest.raises(DataError, match="a.jsonl:31"):
        preprocess([str(path)], strict, str(tmp_path / "out"), journal_seconds=0.0)
    report = preprocess([str(path)], lenient, str(tmp_path / "out"), journal_seconds=0.0)
    assert "continuing an unfinished run" in capsys.readouterr().err
    assert (report.documents, report.rejects) == (40, 1)
    assert report.resumed_documents > 20
    (reject,) = map(json.loads, (tmp_path / "out.rejects.jsonl").read_text().splitlines())
    assert (reject["path"], reject["line"]) == (str(path), 31)


def test_too_many_rejects_end_the_run_until_more_are_allowed(tmp_path: Path) -> None:
    inputs = write_corpus(tmp_path, 300)
    with pytest.raises(
        DataError, match=r"\d documents could not be read, more than --max-rejects 2 .*rejects.jsonl.tmp"
    ):
        run(tmp_path, inputs, "out", max_rejects=2)
    assert len((tmp_path / "out.rejects.jsonl.tmp").read_text().splitlines()) == 3
    run(tmp_path, inputs, "out", max_rejects=None)
    run(tmp_path, inputs, "whole")
    assert_same(tmp_path, "out", "whole")


@pytest.mark.fault("two-runs")
def test_a_second_run_is_refused(tmp_path: Path) -> None:
    import fcntl

    inputs = write_corpus(tmp_path, 20)
    with (tmp_path / "out.lock").open("w") as other:
        other.write("host far, pid 5, job 7\n")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another run writes this dataset .host far, pid 5, job 7"):
            run(tmp_path, inputs, "out")
    run(tmp_path, inputs, "out")  # a lock without a living holder is free
    assert leftovers(tmp_path, "out") == []


@pytest.mark.fault("preprocess")
@pytest.mark.slow
def test_a_full_disk_keeps_what_the_journal_vouches_for(tmp_path: Path) -> None:
    import resource

    inputs = write_corpus(tmp_path, 400)
    complete(tmp_path, inputs)
    limit = (tmp_path / "whole.bin").stat().st_size // 2
    for workers in (1, 2):
        words = command(inputs, tmp_path, f"out{workers}", "--workers", workers)
        done = subprocess.run(
            words,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )
        assert done.returncode == 1, done.stderr
        assert "cannot be written" in done.stderr
        assert "free space" in done.stderr
        assert "continuing an unfinished run" in finish(words)
        assert_same(tmp_path, f"out{workers}", "whole")


# -- the journal -------------------------------------------------------------------------------------------------------


def test_journals_keep_every_state(tmp_path: Path) -> None:
    maker = random.Random(2)
    path = tmp_path / "x.journal"
    journal, states, digests = Journal(path, {"run": "this"}), [], []
    for number in range(30):
        if maker.random() < 0.7:
            digests[-1:] = [f"{maker.getrandbits(64):016x}" for _ in range(maker.randrange(1, 4))]
        writer = WriterState(number, number, 5 * number, 7, tuple(digests))
        states.append(RunState((0, number), writer, {"empty": Dropped(number, 0, 3)}, 10 * number))
        if number == 17:
            loaded = Journal.load(path)
            assert loaded is not None
            journal = loaded
            journal.go_back_to(next(iter(journal.states)))
        journal.append(states[-1])
    found = Journal.load(path)
    assert found is not None
    assert list(found.states) == states[::-1]
    found.go_back_to(states[12])
    again = Journal.load(path)
    assert again is not None
    assert list(again.states) == states[12::-1]
    data = path.read_bytes()
    for cut in range(0, len(data), 41):
        path.write_bytes(data[:cut])
        short = Journal.load(path)
        count = max(data[:cut].count(b"\n") - 1, 0)
        assert list(short.states if short else []) == states[:count][::-1]
    middle = data.split(b"\n")
    path.write_bytes(b"\n".join([*middle[:4], *middle[5:]]))  # a line is missing: what follows cannot be believed
    hole = Journal.load(path)
    assert hole is not None
    assert list(hole.states) == states[2::-1]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["rejects.jsonl", "bin", "lengths", "documents"])
def test_a_temporary_file_that_is_gone_does_not_stop_a_run(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_vocab(tmp_path)
    inputs = [str(write_jsonl(tmp_path / "a.jsonl", ["the cat sat on a mat"] * 4000))]  # nothing to reject
    finish(command(inputs, tmp_path, "whole"))
    monkeypatch.setenv("PAUSE_PER_CHUNK", "0.02")
    program = start(command(inputs, tmp_path, "out"))
    wait_for(tmp_path / "out.journal", program)
    program.kill()
    program.communicate()
    (tmp_path / f"out.{suffix}.tmp").unlink()
    monkeypatch.setenv("PAUSE_PER_CHUNK", "0")
    finish(command(inputs, tmp_path, "out"))
    assert (tmp_path / "out.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()
    assert (tmp_path / "out.idx").read_bytes() == (tmp_path / "whole.idx").read_bytes()
    assert verify(tmp_path / "out") == []
