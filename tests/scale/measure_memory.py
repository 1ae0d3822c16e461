"""Memory of preprocessing over the size of the corpus, the number of workers and time; draws the curves.

    python tests/scale/measure_memory.py --megabytes 40 160 640 --workers 1 2 4 --plot docs/data-memory.png

The corpus is the sample corpus, repeated; each run is the whole program, looked at every 30 milliseconds. Counted is
the memory that processes own (RssAnon): what they have mapped from files, the system takes back when it likes. Prints
one line of JSON per run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import zstandard

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "data_tools" / "sample_corpus" / "public_domain_en.jsonl.zst"
SECONDS_BETWEEN_LOOKS = 0.03
VARIANTS = {"": [], "zst": [], "--split-sentences": ["--split-sentences"], "--dedup": ["--dedup"]}


@dataclass
class Run:
    """What one run took, in bytes: of all its processes together, and of the largest one."""

    variant: str
    workers: int
    text_bytes: int
    tokens: int
    peak_bytes: int = 0
    peak_bytes_of_a_process: int = 0
    curve: list[tuple[float, int]] = field(default_factory=list)  # seconds, bytes of all processes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[40, 160, 640], help="text of the corpora")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="for plain JSON lines")
    parser.add_argument("--tokenizer", type=Path, help="default: WordPiece learnt from the sample corpus")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS)[1:], help="measured with one worker")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory(prefix="taco-memory-") as name:
        folder = Path(name)
        tokenizer = arguments.tokenizer.resolve() if arguments.tokenizer else learn(folder)
        for megabytes in arguments.megabytes:
            write_corpus(folder, megabytes)
            for variant, workers in [("", count) for count in arguments.workers] + [(v, 1) for v in arguments.variants]:
                runs.append(measure(folder, tokenizer, variant, workers))
                print(json.dumps({**asdict(runs[-1]), "curve": None}), flush=True)
    if arguments.plot:
        draw(runs, arguments.plot)


def learn(folder: Path) -> Path:
    words = ["--input", SAMPLE, "--output", folder / "vocab.txt", "--vocab-size", 16000]
    subprocess.run(taco("train-tokenizer", *words), check=True, capture_output=True)
    return folder / "vocab.txt"


def write_corpus(folder: Path, megabytes: int) -> None:
    """corpus.jsonl and the same compressed; no two documents are equal."""
    sample = zstandard.ZstdDecompressor().stream_reader(SAMPLE.open("rb")).read()
    copies = max(1, round(megabytes * 1e6 / len(sample)))
    with (folder / "corpus.jsonl").open("wb") as plain, zstandard.open(folder / "corpus.jsonl.zst", "wb") as packed:
        for copy in range(copies):
            lines = sample.replace(b'"text": "', b'"text": "copy %d ' % copy)
            plain.write(lines)
            packed.write(lines)


def measure(folder: Path, tokenizer: Path, variant: str, workers: int) -> Run:
    """Runs the program and looks at it until it ends."""
    corpus = folder / ("corpus.jsonl.zst" if variant == "zst" else "corpus.jsonl")
    words = ["--input", corpus, "--tokenizer", tokenizer, "--output-prefix", folder / "out", "--overwrite"]
    words += ["--workers", workers, "--json", *VARIANTS[variant]]
    start = time.monotonic()
    run = Run(variant, workers, 0, 0)
    process = psutil.Popen(taco("preprocess", *words), stdout=subprocess.PIPE)
    while process.poll() is None:
        sizes = [own_bytes(pid) for pid in [process.pid, *children_of(process)]]
        run.curve.append((round(time.monotonic() - start, 3), sum(sizes)))
        run.peak_bytes_of_a_process = max(run.peak_bytes_of_a_process, *sizes)
        time.sleep(SECONDS_BETWEEN_LOOKS)
    if process.returncode:
        raise SystemExit(f"preprocessing ended with {process.returncode}; its errors stand above")
    report = json.loads(process.stdout.read())
    run.peak_bytes = max(size for _, size in run.curve)
    run.text_bytes, run.tokens = report["input_bytes"], report["tokens"]
    return run


def children_of(process: psutil.Popen) -> list[int]:
    with suppress(psutil.NoSuchProcess):
        return [child.pid for child in process.children(recursive=True)]
    return []


def own_bytes(pid: int) -> int:
    """RssAnon of a process, 0 when it is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def taco(verb: str, *words: object) -> list[str]:
    return [sys.executable, "-m", "pretrain.cli", "data", verb, *map(str, words)]


def draw(runs: list[Run], path: Path) -> None:
    """Left: peaks over the size of the corpus. Right: the largest corpus over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.5), constrained_layout=True)
    largest = max(run.text_bytes for run in runs)
    for number, (variant, workers) in enumerate(dict.fromkeys((run.variant, run.workers) for run in runs)):
        series = [run for run in runs if (run.variant, run.workers) == (variant, workers)]
        label = f"{workers} worker{'s' if workers > 1 else ''}{f', {variant}' if variant else ''}"
        style = "--" if variant else "-"
        sizes = [run.text_bytes / 1e6 for run in series]
        left.plot(sizes, [run.peak_bytes / 1e6 for run in series], style, color=f"C{number}", marker="o", label=label)
        curve = next(run.curve for run in series if run.text_bytes == largest or run is series[-1])
        right.plot(*zip(*((time_, size / 1e6) for time_, size in curve), strict=True), style, color=f"C{number}", lw=1)
    left.plot(sizes, sizes, ":", color="grey", label="the text itself")
    left.set(
        title="Largest memory of all processes together", xlabel="text of the corpus, MB", ylabel="MB", xscale="log"
    )
    left.set_ylim(0, 1.4 * max(run.peak_bytes for run in runs) / 1e6)
    left.set_xticks(sizes, [f"{size:,.0f}" for size in sizes], minor=False)
    left.minorticks_off()
    right.set(title=f"While {largest / 1e6:,.0f} MB are preprocessed", xlabel="seconds", ylabel="MB")
    right.set_ylim(left.get_ylim())
    for axis in (left, right):
        axis.grid(alpha=0.3)
    left.legend(fontsize=9, ncols=2, loc="upper left")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
