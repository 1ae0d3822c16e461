"""How long training stands still for a checkpoint, with and without a thread that writes it.

    python tests/scale/measure_saves.py --ranks 1 2 --rounds 2

Real runs of BERT-base sizes on the CPU, gloo, a thread per rank: 12 steps, a save after every fourth, alternately with
`checkpoint.asynchronous` true and false. The last save is left out: a run waits for it in both ways. Prints a line of
JSON per run: seconds that training stood still for a save, seconds of writing and of looking for values that are no
numbers, and of all steps and saves together.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from forked import run_ranks  # noqa: E402  # the helpers are not installed
from small_runs import write_small_run  # noqa: E402

from pretrain import engine as engine_module  # noqa: E402
from pretrain.checkpoint import CheckpointManifest, find_checkpoint  # noqa: E402
from pretrain.metrics import read_metrics  # noqa: E402
from pretrain.train import train  # noqa: E402
from pretrain.trainer import Trainer  # noqa: E402

STEPS, EVERY = 12, 4
SIZES: dict[str, Any] = {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "ffn_hidden_size": 3072}
RUN: dict[str, Any] = {
    "model": {**SIZES, "max_position_embeddings": 128, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    "data__seq_length": 32,
    "data__validation": [],
    "train__steps": STEPS,
    "train__micro_batch_size": 2,
    "train__global_batch_size": 4,
    "checkpoint": {"every_steps": EVERY, "keep": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--zero", type=int, default=1, help="stage")
    arguments = parser.parse_args()
    for ranks in arguments.ranks:
        for _ in range(arguments.rounds):
            for mode in ("false", "true"):
                print(json.dumps(measure(ranks, arguments.zero, mode)), flush=True)


def measure(ranks: int, zero: int, mode: str) -> dict[str, Any]:
    """One run; seconds of rank 0."""
    with tempfile.TemporaryDirectory(prefix="taco-saves-") as name:
        folder = Path(name)
        config, run = write_small_run(folder, **RUN), folder / "run"
        overrides = [f"zero.stage={zero}", f"checkpoint.asynchronous={mode}"]
        seconds, looking = run_ranks(ranks, timed, config, overrides, timeout=1200)[0]
        saves = [record for record in read_metrics(run) if "save_stall_seconds" in record]
        num_bytes = sum(record.num_bytes for record in CheckpointManifest.load(find_checkpoint(run)).files)
    return {
        "ranks": ranks,
        "asynchronous": mode == "true",
        "bytes": num_bytes,
        "stall": round(mean(record["save_stall_seconds"] for record in saves[:-1]), 3),
        "write": round(mean(record["save_write_seconds"] for record in saves[:-1]), 3),
        "look": round(mean(looking[:-1]), 3),
        "run": round(seconds, 1),
    }


def timed(config: Path, overrides: list[str]) -> tuple[float, list[float]]:
    """One rank of `taco train`: seconds of its loop, and of each look for values that are no numbers."""
    run, find, seconds, looking = Trainer.run, engine_module.find_non_finite, [0.0], []

    def run_timed(trainer: Trainer) -> Any:
        start = time.monotonic()
        try:
            return run(trainer)
        finally:
            seconds[0] = time.monotonic() - start

    def find_timed(*args: Any) -> Any:
        start = time.monotonic()
        try:
            return find(*args)
        finally:
            looking.append(time.monotonic() - start)

    Trainer.run, engine_module.find_non_finite = run_timed, find_timed  # type: ignore[method-assign]
    train(config=config, overrides=overrides, dry_run=False, allow_change=None)
    return seconds[0], looking


if __name__ == "__main__":
    main()
