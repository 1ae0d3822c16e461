"""`taco bench gpu`: everything that a lent GPU should be asked, in a few minutes, by one command.

The kernels are compared with their twins in torch first. Then experiments run in the order of their importance, in a
process beside this one, each with a time limit and all with a deadline. Results are written as they come; what fails,
lacks a key of the configuration, or finds no time left is recorded with its reason, and the next one goes on.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import IO, Annotated, Any

import typer

from pretrain.bench.contest import machine, spread
from pretrain.bench.gpu_experiments import BERT_LARGE, EXPERIMENTS, TINY, Experiment
from pretrain.bench.gpu_worker import LEAVES_MEMORY
from pretrain.cli import new_program, run_program
from pretrain.errors import ConfigError, TacoError
from pretrain.planner.devices import find_device

app = new_program()

Record = dict[str, Any]

NUMERICS = "numerics"
_TESTS = Path(__file__).parents[2] / "tests"
_LEAST_SECONDS = 3.0  # with less time left nothing begins


@app.command(epilog="Example: taco bench gpu --out gpu-bench.jsonl")
def gpu(
    out: Annotated[Path, typer.Option(help="results, a JSON object per line, written as they come")] = Path(
        "gpu-bench.jsonl"
    ),
    minutes: Annotated[
        float | None,
        typer.Option(min=0.1, max=60.0, help="all of it ends after this time; default: 6, with --tiny 1.8"),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="timed steps of each experiment")] = 10,
    tiny: Annotated[bool, typer.Option("--tiny", help="a tiny model on the CPU, to try the script")] = False,
    only: Annotated[list[str] | None, typer.Option(help="names of experiments; default: all")] = None,
) -> None:
    """Measure BERT-large's step on one GPU in many settings, and check the kernels, within a deadline."""
    chosen = _chosen(only)
    end = time.monotonic() + 60 * (minutes or (1.8 if tiny else 6.0))
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        results: list[Record] = []

        def keep(record: Record) -> None:
            results.append(record)
            file.write(json.dumps(record) + "\n")
            file.flush()
            typer.echo(_show(record))

        keep({"name": "machine", "status": "done", **machine(), "shape": vars(TINY if tiny else BERT_LARGE)})
        if only is None or NUMERICS in only:
            keep(_check_kernels(min(60.0, end - time.monotonic()), is_tiny=tiny))
        for record in _carry_out(chosen, end, is_tiny=tiny, steps=steps):
            keep(record)
    typer.echo(f"\n{_table(results)}\n\nresults: {out}")
    if chosen and not any("seconds" in record for record in results):
        raise TacoError(f"bench: no experiment was carried out; {out} has the reason of each")


def _chosen(only: Sequence[str] | None) -> list[Experiment]:
    names = [experiment.name for experiment in EXPERIMENTS]
    if unknown := [name for name in only or () if name not in (*names, NUMERICS)]:
        raise ConfigError(
            f"--only {unknown[0]!r}: there is no such experiment; choose from {NUMERICS}, {'; '.join(names)}"
        )
    return [experiment for experiment in EXPERIMENTS if only is None or experiment.name in only]


def _check_kernels(limit: float, *, is_tiny: bool) -> Record:
    """Runs the tests that compare each kernel with its twin; on a GPU they run there, else in an interpreter."""
    start = time.monotonic()
    folder = _TESTS / "kernels"
    if not folder.is_dir():
        return {"name": NUMERICS, "status": "skipped", "reason": f"{folder} is not here: this is no checkout"}
    tests = folder / "test_choice.py" if is_tiny else folder
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", str(tests)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit, cwd=_TESTS.parent)
    except subprocess.TimeoutExpired as error:
        so_far = error.stdout.decode(errors="replace")[-300:] if error.stdout else ""
        return {"name": NUMERICS, "status": "out of time", "reason": f"after {limit:.0f} s: {so_far}"}
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
    return {
        "name": NUMERICS,
        "status": "failed" if done.returncode else "done",
        "reason": "\n".join(lines[-12:]) if done.returncode else lines[-1],
        "took": time.monotonic() - start,
    }


# -- experiments in a process beside this one --------------------------------------------------------------------------


def _carry_out(chosen: Sequence[Experiment], end: float, *, is_tiny: bool, steps: int) -> Iterator[Record]:
    """A record for every experiment, in order."""
    left = deque(chosen)
    while left:
        if end - time.monotonic() < _LEAST_SECONDS:
            yield from ({"name": e.name, "status": "out of time", "reason": "the deadline came first"} for e in left)
            return
        worker = _Worker(left, is_tiny=is_tiny, steps=steps)
        try:
            yield from _follow(worker, left, end)
        finally:
            worker.end()


def _follow(worker: _Worker, left: deque[Experiment], end: float) -> Iterator[Record]:
    """Records of one process, until it is at its end or must be ended; takes what it has done out of `left`."""
    stage, begun, limit = "starting", time.monotonic(), 90.0  # importing torch and DeepSpeed
    while left:
        now = time.monotonic()
        line = worker.next_line(max(0.0, min(begun + limit, end) - now))
        if line is None:  # ended by itself, or too slow
            code = worker.process.poll()
            if code == LEAVES_MEMORY:
                return
            too_slow = "the deadline of all came" if time.monotonic() >= end else f"took more than {limit:.0f} s"
            reason = f"while {stage}: {too_slow if code is None else f'{worker.complaint()} (exit code {code})'}"
            status = "failed" if code is not None else "out of time"
            yield {"name": left.popleft().name, "status": status, "reason": reason}
            return
        if line["event"] == "begin":
            stage, begun, limit = "preparing", time.monotonic(), left[0].limit
        elif line["event"] == "stage":
            stage = line["stage"]
        else:
            left.popleft()
            took = time.monotonic() - begun
            stage, begun, limit = "starting", time.monotonic(), 90.0
            yield {**{key: value for key, value in line.items() if key != "event"}, "took": took}


class _Worker:
    """The process, and what it says."""

    def __init__(self, experiments: Sequence[Experiment], *, is_tiny: bool, steps: int) -> None:
        names = [experiment.name for experiment in experiments]
        command = [
            sys.executable,
            "-m",
            "pretrain.bench.gpu_worker",
            "tiny" if is_tiny else "large",
            str(steps),
            *names,
        ]
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  # see `end`
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._errors, text=True)
        self._lines: queue.Queue[Record | None] = queue.Queue()
        assert self.process.stdout is not None
        threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True).start()

    def next_line(self, seconds: float) -> Record | None:
        """What it says next; None if it ends or says nothing for this long."""
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            return None
        if line is None:
            self.process.wait()
        return line

    def complaint(self) -> str:
        """The last line that it wrote to standard error."""
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        return lines[-1][:500] if lines else "it said nothing"

    def end(self) -> None:
        """End it, if it still runs."""
        self.process.kill()
        self.process.wait()
        self._errors.close()

    def _read(self, stream: IO[str]) -> None:
        for text in stream:
            try:
                line = json.loads(text)
            except ValueError:  # libraries talk too
                continue
            if isinstance(line, dict) and "event" in line:
                self._lines.put(line)
        self._lines.put(None)


# -- for people --------------------------------------------------------------------------------------------------------


def _show(record: Record) -> str:
    name, status = record["name"], record["status"]
    if "seconds" not in record:
        reason = record.get("reason", "")
        return f"{name}: {status}{f': {reason}' if reason else ''}"
    return f"{name}: {1e3 * median(record['seconds']):.2f} ms per step (took {record['took']:.0f} s)"


_COLUMNS = (
    "experiment",
    "ms",
    "quartiles",
    "forward / backward / optimizer / host",
    "GPU busy ms",
    "kernels",
    "waits",
    "peak GB",
    "real tokens/s",
    "model TFLOP/s",
    "MFU",
)


def _table(results: Sequence[Record]) -> str:
    """A table in Markdown of what was measured, the price of the contrastive loss, and what was not measured."""
    rows = [_row(record) for record in results if "seconds" in record]
    lines = [f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS), *(f"| {' | '.join(row)} |" for row in rows)]
    seconds = {record["name"]: median(record["seconds"]) for record in results if "seconds" in record}
    for both, alone in (("taco", "mlm"), ("graphs", "graphs, mlm")):
        if {both, alone} <= seconds.keys():
            lines.append(f"\nprice of the contrastive loss, {both}: {seconds[both] / seconds[alone] - 1:.1%}")
    missing = [f"{r['name']}: {r['status']}: {r.get('reason', '')}" for r in results if r["status"] != "done"]
    return "\n".join(lines + (["\nnot measured:", *missing] if missing else []))


def _row(record: Record) -> tuple[str, ...]:
    times, profile = spread(record["seconds"]), record.get("profile", {})
    begin = (
        record["name"],
        f"{1e3 * times.median:.2f}",
        f"{1e3 * times.lower:.2f} to {1e3 * times.upper:.2f}",
    )
    if "model_flops" not in record:  # a loss alone
        return (*begin, *[""] * (len(_COLUMNS) - len(begin)))
    rate = record["model_flops"] / times.median
    device = find_device(record["device_name"])
    peak = device.peak("bf16") if device is not None else None
    parts = record.get("parts", {})
    return (
        *begin,
        " / ".join(f"{1e3 * parts[part]:.1f}" for part in ("forward", "backward", "optimizer", "host") if parts),
        f"{1e3 * profile['busy_seconds']:.2f}" if "busy_seconds" in profile else "",
        f"{profile['kernel_count']:,}" if "kernel_count" in profile else "",
        str(profile.get("synchronisations", "")),
        f"{record['peak_bytes'] / 1e9:.2f}",
        f"{record['real_tokens'] / times.median:,.0f}",
        f"{rate / 1e12:.4g}",
        "" if peak is None else f"{rate / peak:.1%}",
    )


if __name__ == "__main__":
    run_program(app, name="python -m pretrain.bench.gpu")
