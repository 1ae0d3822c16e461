"""One step under torch's profiler: what the GPU ran, what the host called, how often and how long.

Times of a profiled step are longer than those of others on the host; counts and GPU times are not affected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_MOST_ROWS = 40
_RUNTIME = ("cuda", "cu")  # how calls of CUDA's own functions begin: cudaLaunchKernel, cuLaunchKernelEx


@dataclass
class _Total:
    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.seconds += seconds


def profile_step(run: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """Runs it once under the profiler; JSON types, as `summarise` returns them."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    is_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
    if is_gpu:
        torch.cuda.synchronize(device)
    with profile(activities=activities, acc_events=True) as recorded:
        run()
        if is_gpu:
            torch.cuda.synchronize(device)  # the last one that is counted, and left out again
    return summarise(recorded.events(), is_gpu=is_gpu)


def summarise(events: Iterable[Any], *, is_gpu: bool) -> dict[str, Any]:
    """Counts and seconds of a step.

    `host`: each operator and call of CUDA with its own time on the host, without what it calls. On a GPU `kernels`
    (copies and fills of memory included), their number, the seconds in which the GPU was busy, and how often the host
    waited for it. `operators` counts the operators that torch dispatched, those inside others included.
    """
    host: dict[str, _Total] = {}
    kernels: dict[str, _Total] = {}
    intervals: list[tuple[float, float]] = []
    for event in events:
        if getattr(event, "is_user_annotation", False):
            continue
        if "CPU" in str(event.device_type):
            host.setdefault(event.name, _Total()).add(event.self_cpu_time_total / 1e6)
        elif not event.name.startswith(("Optimizer.", "ProfilerStep")):
            start, end = event.time_range.start / 1e6, event.time_range.end / 1e6
            kernels.setdefault(event.name, _Total()).add(end - start)
            intervals.append((start, end))
    summary: dict[str, Any] = {
        "operators": sum(total.count for name, total in host.items() if name.startswith("aten::")),
        "host": _rows(host),
    }
    if is_gpu:
        waits = sum(total.count for name, total in host.items() if name.startswith(_RUNTIME) and "Synchronize" in name)
        summary |= {
            "busy_seconds": _covered(intervals),
            "kernel_count": sum(total.count for total in kernels.values()),
            "synchronisations": max(waits - 1, 0),
            "kernels": _rows(kernels),
        }
    return summary


def show_profile(name: str, answer: dict[str, Any]) -> str:
    """The tables of one contender for people."""
    profile = answer["profile"]
    lines = [f"== {name}", f"{profile['operators']:,} operators dispatched by torch in one step"]
    if "kernel_count" in profile:
        lines.append(
            f"GPU busy {1e3 * profile['busy_seconds']:.2f} ms, {profile['kernel_count']:,} kernels, the host waited "
            f"{profile['synchronisations']} times"
        )
        lines += ["-- GPU: ms, times, kernel", *map(_show_row, profile["kernels"])]
    return "\n".join([*lines, "-- host: ms of its own, times, call", *map(_show_row, profile["host"])])


def _rows(totals: dict[str, _Total]) -> list[list[Any]]:
    """[name, count, seconds], the longest first; what is left is one row."""
    ranked = sorted(totals.items(), key=lambda item: -item[1].seconds)
    rows: list[list[Any]] = [[name, total.count, total.seconds] for name, total in ranked[:_MOST_ROWS]]
    if rest := [total for _, total in ranked[_MOST_ROWS:]]:
        rows.append([f"{len(rest)} others", sum(t.count for t in rest), sum(t.seconds for t in rest)])
    return rows


def _show_row(row: list[Any]) -> str:
    name, count, seconds = row
    return f"{1e3 * seconds:9.3f} {count:7,}  {name[:110]}"


def _covered(intervals: list[tuple[float, float]]) -> float:
    """Seconds that lie in at least one of them: kernels of several streams may run at once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total
