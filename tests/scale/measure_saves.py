"""How long training stands still for a checkpoint, with and without a thread that writes it.

    python tests/scale/measure_saves.py --ranks 1 2 --rounds 2
    DS_ACCELERATOR=cuda python tests/scale/measure_saves.py --device cuda --ranks 1 --rounds 2

Real runs, alternately with `checkpoint.asynchronous` true and false, each with two saves and a last one that is left
out, since a run waits for it in both ways. On the CPU BERT-base sizes in fp32, gloo, a thread per rank, a save after
every fourth step; on a GPU BERT-large sizes in bf16, a save after every fortieth, in which the one before is written.
Prints a line of JSON per run: bytes of a checkpoint; seconds that training stood still for a save, and of them those in
which steps that were started came to their end (`drain`), values that are no numbers were looked for (`look`), and
copies were made (`copy`); seconds of writing, and of all steps and saves together.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from forked import run_ranks  # noqa: E402  # the helpers are not installed
from small_runs import write_small_run  # noqa: E402

from pretrain.checkpoint.captured_state import HostMemory  # noqa: E402
from pretrain.checkpoint.manifest import CheckpointManifest, find_checkpoint  # noqa: E402
from pretrain.engine import engine as engine_module  # noqa: E402
from pretrain.engine.engine import Engine  # noqa: E402
from pretrain.metrics import read_metrics  # noqa: E402
from pretrain.train import train  # noqa: E402
from pretrain.trainer import Trainer  # noqa: E402

BASE: dict[str, Any] = {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "ffn_hidden_size": 3072}
LARGE: dict[str, Any] = {"num_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "ffn_hidden_size": 4096}


class Shape(NamedTuple):
    """What is trained on a kind of device: a save after `every` steps."""

    sizes: dict[str, Any]
    every: int
    rows: int
    seq_length: int
    precision: str


SHAPES = {"cpu": Shape(BASE, 4, 2, 32, "fp32"), "cuda": Shape(LARGE, 40, 64, 128, "bf16")}


def run_of(device: str) -> dict[str, Any]:
    """The changes to a small run that make it one of this device's shape, with three saves."""
    shape = SHAPES[device]
    return {
        "model": {**shape.sizes, "max_position_embeddings": 128, "hidden_dropout": 0.0, "attention_dropout": 0.0},
        "data__seq_length": shape.seq_length,
        "data__validation": [],
        "run__device": device,
        "train__steps": 3 * shape.every,
        "train__micro_batch_size": shape.rows,
        "train__global_batch_size": 2 * shape.rows,
        "precision": shape.precision,
        "checkpoint": {"every_steps": shape.every, "keep": 1},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", choices=sorted(SHAPES), default="cpu")
    parser.add_argument("--zero", type=int, default=1, help="stage")
    arguments = parser.parse_args()
    for ranks in arguments.ranks:
        for _ in range(arguments.rounds):
            for mode in ("false", "true"):
                print(json.dumps(measure(arguments.device, ranks, arguments.zero, mode)), flush=True)


def measure(device: str, ranks: int, zero: int, mode: str) -> dict[str, Any]:
    """One run; seconds of rank 0."""
    with tempfile.TemporaryDirectory(prefix="taco-saves-") as name:
        folder = Path(name)
        config, run = write_small_run(folder, **run_of(device)), folder / "run"
        overrides = [f"zero.stage={zero}", f"checkpoint.asynchronous={mode}"]
        seconds, parts = run_ranks(ranks, timed, config, overrides, timeout=1200)[0]
        saves = [record for record in read_metrics(run) if "save_stall_seconds" in record]
        num_bytes = sum(record.num_bytes for record in CheckpointManifest.load(find_checkpoint(run)).files)
    return {
        "ranks": ranks,
        "asynchronous": mode == "true",
        "bytes": num_bytes,
        "stall": round(mean(record["save_stall_seconds"] for record in saves[:-1]), 3),
        "write": round(mean(record["save_write_seconds"] for record in saves[:-1]), 3),
        **{name: round(mean(part), 3) for name, part in parts.items() if part},
        "run": round(seconds, 1),
    }


def timed(config: Path, overrides: list[str]) -> tuple[float, dict[str, list[float]]]:
    """One rank of `taco train`: seconds of its loop, and of the parts of each save but the last."""
    loop: list[float] = []
    waits: list[float] = []
    parts: dict[str, list[float]] = {"look": [], "copy": []}
    Trainer.run = timing(Trainer.run, loop)  # type: ignore[method-assign]
    Engine._wait_for_device = timing(Engine._wait_for_device, waits)  # type: ignore[method-assign]
    HostMemory.copy = timing(HostMemory.copy, parts["copy"])  # type: ignore[method-assign]
    engine_module.find_non_finite = timing(engine_module.find_non_finite, parts["look"])
    train(config=config, overrides=overrides, dry_run=False, allow_change=None)
    if parts["copy"]:  # a GPU is waited for before the look and after copies were started
        parts["drain"] = waits[::2]
        parts["copy"] = [start + end for start, end in zip(parts["copy"], waits[1::2], strict=True)]
    else:
        parts["drain"] = waits
    return loop[0], {name: seconds[:-1] for name, seconds in parts.items()}


def timing(work: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The same function, which adds to `seconds` how long each call took."""

    def timed_work(*args: Any, **kwargs: Any) -> Any:
        start = time.monotonic()
        try:
            return work(*args, **kwargs)
        finally:
            seconds.append(time.monotonic() - start)

    return timed_work


if __name__ == "__main__":
    main()
