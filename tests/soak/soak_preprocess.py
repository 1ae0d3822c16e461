"""Kills preprocessing at random times until the time is up, and holds every dataset against an undisturbed one.

    python tests/soak/soak_preprocess.py --seconds 600 --megabytes 200
    python tests/soak/soak_preprocess.py --input CORPUS --tokenizer vocab.txt --kills 2 --workers 1 2 --rounds 2

One round makes one dataset. While it grows, the program and its workers are killed, stopped for a while, or asked to
end; each time the same command goes on with another number of workers. With --kills the program is killed so often in
every round and nothing else happens, and with --workers all runs of a round have the same number of them. In the end
every byte must be that of the dataset that nobody disturbed. Prints a table; the first difference, hang or unexpected
end is exit code 1, and the files stay.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import zstandard

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "data_tools" / "sample_corpus" / "public_domain_en.jsonl.zst"
PREFIX = "data"
TOKEN_BYTES = 2
HANG_SECONDS = 300
FAULTS = ("tool", "tool", "worker", "worker stop", "terminate")


@dataclass
class Tally:
    """What a soak did; bytes are those of token ids, `tokens` those of one dataset."""

    tokens: int = 0
    rounds: int = 0
    runs: int = 0
    tool_kills: int = 0
    worker_kills: int = 0
    worker_stops: int = 0
    terminations: int = 0
    resumes: int = 0
    bytes_written: int = 0
    bytes_lost: int = 0


class SoakError(Exception):
    """The dataset differs, or a run ended as none should."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600, help="start no new round after so long")
    parser.add_argument("--rounds", type=int, help="end after so many rounds, whatever the time")
    parser.add_argument("--megabytes", type=float, default=100, help="text of the corpus, at least")
    parser.add_argument("--input", type=Path, nargs="+", help="instead of the sample corpus, repeated")
    parser.add_argument("--tokenizer", type=Path, help="instead of a vocabulary learnt from the sample corpus")
    parser.add_argument(
        "--workers", type=int, nargs="+", help="of the rounds, in turn; else another number for each run"
    )
    parser.add_argument("--max-workers", type=int, default=3)
    parser.add_argument("--faults", type=int, default=4, help="faults per round, at most")
    parser.add_argument("--kills", type=int, help="kill the program so often in every round, instead of other faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="taco-soak-"))
    tally = soak(folder, arguments)
    shutil.rmtree(folder)
    print(json.dumps(asdict(tally)) if arguments.json else table(tally))


def soak(folder: Path, arguments: argparse.Namespace) -> Tally:
    """Makes the corpus and the undisturbed dataset, then rounds; raises SoakError, leaving `folder`."""
    inputs = [path.resolve() for path in arguments.input or make_corpus(folder, arguments.megabytes)]
    vocab = arguments.tokenizer.resolve() if arguments.tokenizer else learn_vocab(folder)
    duration = undisturbed(folder, inputs, vocab)
    tally, start = Tally(), time.monotonic()
    expected = content(folder / "expected")
    tally.tokens = (folder / "expected" / f"{PREFIX}.bin").stat().st_size // TOKEN_BYTES
    random_ = random.Random(arguments.seed)
    while tally.rounds < arguments.rounds if arguments.rounds else time.monotonic() - start < arguments.seconds:
        workers = arguments.workers[tally.rounds % len(arguments.workers)] if arguments.workers else None
        if arguments.kills is None:
            disturbance = Disturbance(random_, FAULTS, random_.randint(1, arguments.faults), duration)
        else:
            disturbance = Disturbance(random_, ("tool",), arguments.kills, 1.2 * duration / (arguments.kills + 1))
        before = tally.tool_kills
        run_round(folder, inputs, vocab, disturbance, workers, arguments.max_workers, tally)
        found = content(folder / "out")
        if found != expected:
            different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            raise SoakError(f"{folder}: round {tally.rounds}: these files differ: {', '.join(different)}")
        if arguments.kills is None or tally.tool_kills == before + arguments.kills:
            tally.rounds += 1  # else the dataset was complete before its last kill: another attempt
    return tally


@dataclass
class Disturbance:
    """So many of the `faults` in a round, each within `max_seconds` of the start of a run."""

    random_: random.Random
    faults: tuple[str, ...]
    remaining: int
    max_seconds: float


def make_corpus(folder: Path, megabytes: float) -> list[Path]:
    """The sample corpus, repeated, in files of all kinds of reading."""
    sample = zstandard.ZstdDecompressor().stream_reader(SAMPLE.open("rb")).read()
    texts = [json.loads(line)["text"] for line in sample.splitlines()]
    repeats = max(1, round(megabytes * 1e6 / 4 / len(sample)))
    lines = b"".join(sample.replace(b'"text": "', b'"text": "copy %d ' % i) for i in range(repeats))
    files = {
        "a.jsonl": lines,
        "b.jsonl.gz": gzip.compress(lines, 1),
        "c.jsonl.zst": zstandard.compress(lines),
        "d.txt": "\n\n".join(texts * repeats).encode() + b"\n",
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in files]


def learn_vocab(folder: Path) -> Path:
    """A vocabulary of the sample corpus."""
    vocab = folder / "vocab.txt"
    command = tool("train-tokenizer", "--input", SAMPLE, "--output", vocab, "--vocab-size", 2000)
    subprocess.run(command, check=True, capture_output=True)
    return vocab


def undisturbed(folder: Path, inputs: list[Path], vocab: Path) -> float:
    """Makes folder/expected and returns how many seconds that took."""
    start = time.monotonic()
    (folder / "expected").mkdir()
    subprocess.run(preprocess(inputs, vocab, 0), check=True, capture_output=True, cwd=folder / "expected")
    return time.monotonic() - start


def run_round(
    folder: Path,
    inputs: list[Path],
    vocab: Path,
    disturbance: Disturbance,
    workers_of_all: int | None,
    max_workers: int,
    tally: Tally,
) -> None:
    """One dataset, folder/out, made with interruptions."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    (folder / "out").mkdir()
    while True:
        workers = disturbance.random_.randint(0, max_workers) if workers_of_all is None else workers_of_all
        with (folder / "log.txt").open("w+", encoding="utf-8") as log:
            process = psutil.Popen(preprocess(inputs, vocab, workers), stdout=log, stderr=log, cwd=folder / "out")
            tally.runs += 1
            expected_codes = {0}
            if disturbance.remaining > 0:
                disturbance.remaining -= 1
                expected_codes |= disturb(process, disturbance, tally)
            try:
                code = process.wait(HANG_SECONDS)
            except psutil.TimeoutExpired:
                raise SoakError(f"{folder}: a run with {workers} workers hangs since {HANG_SECONDS} s") from None
            log.seek(0)
            words = log.read()
        tally.resumes += "continuing an unfinished run" in words
        if code not in expected_codes:
            raise SoakError(f"{folder}: a run with {workers} workers ended with {code}:\n{words}")
        tally.tool_kills += code == -signal.SIGKILL  # one that came too late killed nothing
        if code == 0 or is_complete(folder / "out" / PREFIX):
            return
        written, committed = progress(folder / "out" / PREFIX)
        tally.bytes_lost += written - committed
        tally.bytes_written += written


def disturb(process: psutil.Popen, disturbance: Disturbance, tally: Tally) -> set[int]:
    """Does something to a run after a random time; returns the exit codes that this may lead to, besides 0."""
    random_ = disturbance.random_
    time.sleep(random_.uniform(0, disturbance.max_seconds))
    fault = random_.choice(disturbance.faults)
    try:
        children = process.children()
        if fault.startswith("worker") and children:
            victim = random_.choice(children)
            if fault == "worker":
                victim.kill()
                tally.worker_kills += 1
                return set()  # its work is done again; the run itself goes on
            victim.suspend()
            tally.worker_stops += 1
            time.sleep(random_.uniform(0, 1))
            victim.resume()
            return set()
        if fault == "terminate":
            process.terminate()
            tally.terminations += 1
            return {75, -signal.SIGTERM}  # the latter before the program has begun to listen
        process.kill()
    except psutil.NoSuchProcess:
        pass
    return {-signal.SIGKILL}


def is_complete(prefix: Path) -> bool:
    """Whether a run had done all, and only had to end, when it was killed: another one would refuse to replace that."""
    return Path(f"{prefix}.json").exists() and not Path(f"{prefix}.journal").exists()


def progress(prefix: Path) -> tuple[int, int]:
    """Bytes of token ids that stand on the disk, and how many of them the journal vouches for."""
    try:
        written = Path(f"{prefix}.bin.tmp").stat().st_size
        lines = Path(f"{prefix}.journal").read_bytes().splitlines()
        return written, json.loads(lines[-1].split(b" ", 1)[1])["writer"]["tokens"] * TOKEN_BYTES
    except (FileNotFoundError, IndexError, KeyError, ValueError):
        return 0, 0


def content(folder: Path) -> dict[str, bytes]:
    """Every file under `folder`; the datasets have one name in two folders, so that even their manifests are equal."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tool(verb: str, *words: object) -> list[str]:
    """The command line of a data verb, run by this interpreter."""
    return [sys.executable, "-m", "pretrain.cli", "data", verb, *map(str, words)]


def preprocess(inputs: list[Path], vocab: Path, workers: int) -> list[str]:
    """The command line that makes the dataset PREFIX in the folder where it runs."""
    options = ["--tokenizer", vocab, "--output-prefix", PREFIX, "--workers", workers, "--journal-seconds", 0.2]
    return tool("preprocess", "--input", *inputs, *options)


def table(tally: Tally) -> str:
    share = tally.bytes_lost / max(tally.bytes_written, 1)
    rows = {
        "tokens of a dataset": f"{tally.tokens:,}",
        "datasets made, every byte as in an undisturbed run": tally.rounds,
        "runs": tally.runs,
        "runs that went on with another's work": tally.resumes,
        "kills of the program": tally.tool_kills,
        "kills of a worker": tally.worker_kills,
        "workers stopped for a while": tally.worker_stops,
        "requests to end (SIGTERM)": tally.terminations,
        "token ids on disk at an interruption, MB": f"{tally.bytes_written / 1e6:.1f}",
        "of these done again": f"{tally.bytes_lost / 1e6:.1f} ({share:.1%})",
    }
    return "\n".join(f"{name:42} {value}" for name, value in rows.items())


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH", str(ROOT))
    try:
        main()
    except SoakError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
