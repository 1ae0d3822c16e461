"""The speed of a run between two reports: tokens and operations per second, MFU and HFU, and the parts of a step."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

from pretrain.config.sections import RunConfig
from pretrain.data.batches import Batch
from pretrain.meters.matmul import arithmetic_of, measure_matmul, measured_in
from pretrain.meters.step_clock import StepClock
from pretrain.parallel.mesh import Mesh
from pretrain.planner.devices import find_device
from pretrain.planner.flops import TokenCounts, count_rows, step_flops
from pretrain.runlog import get_logger

log = get_logger(__name__)


class SpeedMeter:
    """Counts what this rank's micro-batches hold; operations per second are those of one device.

    The rows of a data-parallel rank are shared by `mesh.tp_size * mesh.pp_size` devices. Rank 0's rows stand for all:
    which rank gets which rows is random.
    """

    def __init__(self, config: RunConfig, vocab_size: int, mesh: Mesh, device: torch.device, clock: StepClock) -> None:
        self._config, self._vocab_size, self._device, self._clock = config, vocab_size, device, clock
        self._num_devices = mesh.tp_size * mesh.pp_size
        self._is_padded = config.data.row_mode != "stream"
        self._rows = 0
        self._counts = TokenCounts()
        self._steps = 0
        self._since = time.monotonic()
        self.matmul: float | None = None
        self.peak: float | None = None

    def measure_device(self) -> None:
        """Find the device's peak and measure its matrix products; every rank does, at the same time."""
        name = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else None
        kind = find_device(name) if name is not None else None
        arithmetic = arithmetic_of(self._config, self._device)
        self.peak = kind.peak(arithmetic) if kind is not None else None
        self.matmul = measure_matmul(self._config, self._device)
        measured = f"matrix products of this run's size: {_shown(self.matmul)} in {measured_in(self._config)}"
        if self.peak is not None:
            log.info("%s: peak of %s in %s; %s", name, _shown(self.peak), arithmetic, measured)
        elif name is not None:
            log.info("%s: its peak is not in pretrain/planner/devices.toml, so there is no MFU; %s", name, measured)
        else:
            log.info("%s", measured)

    def count(self, micro_batches: Iterable[Batch]) -> None:
        """A step was taken on these, the rank's own."""
        by_document, in_stages = self._config.data.row_mode == "pack", self._config.parallel.pipeline > 1
        for batch in micro_batches:
            counted = count_rows(
                batch.segment_BL, batch.masked_label_M, by_document=by_document, computes_padding=in_stages
            )
            self._counts += counted
            self._rows += len(batch.segment_BL)
        self._steps += 1

    def restart(self) -> None:
        """Leave the time since the last report out: it was not spent on steps."""
        self._counts, self._rows, self._steps, self._since = TokenCounts(), 0, 0, time.monotonic()

    def take(self) -> dict[str, float]:
        """The fields of a record, over the steps since the last call; what is not known is left out."""
        now = time.monotonic()
        seconds, counts, places = max(now - self._since, 1e-9), self._counts, self._rows * self._config.data.seq_length
        rate = self._steps * self._config.train.global_batch_size * self._config.data.seq_length / seconds
        self.restart()
        fields = {"tokens_per_second": rate}
        if self._is_padded and places:
            fields["real_tokens_per_second"] = rate * counts.tokens / places
        return fields | self._operations(counts, seconds) | self._parts()

    def _operations(self, counts: TokenCounts, seconds: float) -> dict[str, float]:
        flops = step_flops(self._config, self._vocab_size, counts)
        model, hardware = (value / seconds / self._num_devices for value in (flops.model, flops.hardware))
        fields = {"model_tflops": model / 1e12, "hardware_tflops": hardware / 1e12}
        if self.peak is not None:
            fields |= {"mfu": model / self.peak, "hfu": hardware / self.peak}
        if self.matmul is not None:
            fields |= {"mfu_of_matmul": model / self.matmul, "hfu_of_matmul": hardware / self.matmul}
        return fields

    def _parts(self) -> dict[str, float]:
        times = self._clock.take()
        if times is None:
            return {}
        parts = {f"{part}_seconds": seconds for part, seconds in times.parts.items()}
        return {"step_seconds": times.wall, **parts}


def describe_speed(fields: dict[str, float]) -> str:
    """Operations per second for people: 231.4 TFLOP/s, MFU 23.4 %, 31.0 % of its matrix products."""
    shares = [
        text.format(100 * fields[name])
        for name, text in (("mfu", "MFU {:.1f} %"), ("mfu_of_matmul", "{:.1f} % of its matrix products"))
        if name in fields
    ]
    return ", ".join([_shown(1e12 * fields["model_tflops"]), *shares])


def _shown(operations_per_second: float) -> str:
    if operations_per_second >= 1e12:
        return f"{operations_per_second / 1e12:.4g} TFLOP/s"
    return f"{operations_per_second / 1e9:.3g} GFLOP/s"
