"""The data programs as a user starts them: real processes on real files, with what they left behind and used."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from project import ROOT

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]


@dataclass(frozen=True)
class Ended:
    """How a process ended; `peak_bytes` is the largest memory of it and of each process that it waited for."""

    code: int
    stdout: str
    stderr: str
    peak_bytes: int

    def check(self) -> Ended:
        """Itself, if all went well."""
        assert self.code == 0, self.stderr
        return self

    def check_error(self, *words: str, code: int = 1) -> Ended:
        """Itself, if it ended with `code` and one line of error that holds `words`."""
        assert self.code == code, (self.code, self.stderr)
        errors = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, self.stderr
        assert all(word in errors[0] for word in words), errors[0]
        assert "Traceback" not in self.stderr
        return self


def run_data(folder: Path, verb: str, *words: object, timeout: float = 200, prefix: tuple[str, ...] = ()) -> Ended:
    """`taco data VERB WORDS` in `folder`, behind the command `prefix`."""
    peak = folder / "peak.log"
    command = [sys.executable, str(ROOT / "tests/helpers/with_peak_memory.py"), str(peak)]
    command += [*prefix, sys.executable, "-m", "pretrain.cli", "data", verb, *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT))}
    with (folder / "stdout.log").open("w+") as stdout, (folder / "stderr.log").open("w+") as stderr:
        process = subprocess.Popen(
            command, cwd=folder, stdout=stdout, stderr=stderr, env=environment, start_new_session=True
        )
        try:
            code = process.wait(timeout)
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read())
    return Ended(code, texts[0], texts[1], int(peak.read_text()))


def preprocess(folder: Path, *words: object, output: str = "out", **options: object) -> Ended:
    """`taco data preprocess WORDS` with the vocabulary of `write_vocab` and the prefix `output`."""
    vocab = folder / "vocab.txt"
    if not vocab.exists():
        write_vocab(folder)
    return run_data(folder, "preprocess", "--tokenizer", vocab, "--output-prefix", output, *words, **options)  # type: ignore[arg-type]


def write_vocab(folder: Path) -> Path:
    """A vocabulary that spells every English word."""
    pieces = [
        *SPECIAL,
        "the",
        "cat",
        "sat",
        "mat",
        "good",
        *LETTERS,
        *(f"##{letter}" for letter in LETTERS),
        ".",
        "中",
        "ש",
    ]
    path = folder / "vocab.txt"
    path.write_text("\n".join(pieces) + "\n", encoding="utf-8")
    return path


def write_lines(path: Path, texts: list[str]) -> Path:
    """A .jsonl file with one document per text."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def looks_finished(folder: Path, output: str = "out") -> list[str]:
    """What a reader of datasets would open, or take for a part of one."""
    return [suffix for suffix in (".bin", ".idx", ".json") if (folder / f"{output}{suffix}").exists()]


def dataset_bytes(folder: Path, output: str = "out") -> dict[str, bytes]:
    """The token files of a dataset."""
    return {suffix: (folder / f"{output}{suffix}").read_bytes() for suffix in (".bin", ".idx")}


def rejects(folder: Path, output: str = "out") -> list[dict]:
    """PREFIX.rejects.jsonl."""
    return [json.loads(line) for line in (folder / f"{output}.rejects.jsonl").read_text().splitlines()]
