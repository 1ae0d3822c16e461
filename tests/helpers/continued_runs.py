"""Runs of preprocessing that are cut at a chunk or started as a program, and what they leave."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corpora import write_jsonl, write_vocab
from project import ROOT

from data_tools.encoding.encode import EncodeOptions
from data_tools.preprocess import preprocess
from data_tools.readers import ReadOptions
from pretrain.data.dataset.verification import verify

# Starts the program with chunks of 2 KiB, each as slow as a test asks for.
PROGRAM = """
import dataclasses, os, sys, time
import data_tools.readers.options as options
from data_tools.output import resumable
options.ReadOptions.__init__.__defaults__ = tuple(
    2048 if field.name == "chunk_bytes" else field.default for field in dataclasses.fields(options.ReadOptions)
)
take_in, pause = resumable.ResumableRun.append, float(os.environ.get("PAUSE_PER_CHUNK", 0))
resumable.ResumableRun.append = lambda *arguments: (time.sleep(pause), take_in(*arguments))[1]
from data_tools.preprocess import app
from pretrain.cli import run_program
run_program(app, sys.argv[1:])
"""

SUFFIXES = (".bin", ".idx", ".json", ".rejects.jsonl")


def write_corpus(folder: Path, count: int = 400) -> list[str]:
    """Two files of documents, some empty and some broken; the second is compressed."""
    maker = random.Random(5)
    words = ["the", "cat", "sat", "on", "a", "mat", "café", "中文"]
    texts = [" ".join(maker.choices(words, k=maker.randrange(0, 60))) for _ in range(count)]
    first = write_jsonl(folder / "a.jsonl", texts)
    lines = first.read_bytes().split(b"\n")
    for number in range(9, len(lines) - 1, 50):
        lines[number] = b'{"text": '
    first.write_bytes(b"\n".join(lines))
    second = write_jsonl(folder / "b.jsonl.gz", texts[::-1])
    return [str(first), str(second)]


def command(inputs: list[str], folder: Path, name: str, *options: object) -> list[str]:
    words = ["--input", *inputs, "--tokenizer", folder / "vocab.txt", "--output-prefix", folder / name]
    words += ["--on-error", "skip", "--journal-seconds", 0.03, *options]
    return [sys.executable, "-c", PROGRAM, *map(str, words)]


def start(words: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(words, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def content(folder: Path, name: str) -> dict[str, bytes]:
    found = {suffix: (folder / f"{name}{suffix}").read_bytes() for suffix in SUFFIXES}
    return {**found, ".json": found[".json"].replace(f"/{name}".encode(), b"/NAME")}


def leftovers(folder: Path, name: str) -> list[str]:
    expected = {f"{name}{suffix}" for suffix in (*SUFFIXES, ".tokenizer")}
    return sorted(path.name for path in folder.glob(f"{name}*") if path.name not in expected)


def without_hash(manifest: bytes) -> dict[str, object]:
    return {key: value for key, value in json.loads(manifest).items() if not key.endswith("xxh3_128")}


def assert_same(folder: Path, name: str, expected: str) -> None:
    found, wanted = content(folder, name), content(folder, expected)
    assert without_hash(found.pop(".json")) == without_hash(wanted.pop(".json"))
    assert found == wanted
    assert verify(folder / name) == []
    assert leftovers(folder, name) == []


def finish(words: list[str]) -> str:
    program = start(words)
    _, errors = program.communicate(timeout=120)
    assert program.returncode == 0, errors
    return errors


def complete(folder: Path, inputs: list[str]) -> float:
    """The dataset `whole` of a run that nobody disturbs; seconds that it took."""
    write_vocab(folder)
    begin = time.monotonic()
    finish(command(inputs, folder, "whole"))
    return time.monotonic() - begin


def wait_for(path: Path, program: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert program.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Cut(Exception):
    """The end of a run."""


def run(folder: Path, inputs: list[str], name: str, chunks: int | None = None, **how: object) -> None:
    """One run in this process, ended after `chunks` as if by kill -9 as far as its files go."""
    options = EncodeOptions(str(write_vocab(folder)), reading=ReadOptions(on_error="skip", chunk_bytes=2048))
    how = {"journal_seconds": 0.0, **how}
    if chunks is None:
        preprocess(inputs, options, str(folder / name), **how)  # type: ignore[arg-type]
        return
    with pytest.MonkeyPatch.context() as patch:
        from data_tools.output import resumable

        original, done = resumable.ResumableRun.append, 0

        def append(*arguments: object) -> None:
            nonlocal done
            original(*arguments)  # type: ignore[arg-type]
            done += 1
            if done == chunks:
                raise Cut

        patch.setattr(resumable.ResumableRun, "append", append)
        with pytest.raises(Cut):
            preprocess(inputs, options, str(folder / name), **how)  # type: ignore[arg-type]
