"""The parts of a step add up to its time: on the host's clock for a CPU, by events for a GPU."""

from __future__ import annotations

import time

import pytest
import torch

from pretrain.meters.step_clock import PARTS, StepClock
from pretrain.resilience.heartbeat import Heartbeat

CPU = torch.device("cpu")


def enter_all(clock: StepClock, *stages: tuple[str, float]) -> None:
    for stage, now in stages:
        clock.enter(stage, now)


def test_parts_of_steps_on_a_cpu_add_up_and_leave_evaluations_out() -> None:
    clock = StepClock(CPU)
    enter_all(clock, ("start", 0.0), ("data", 10.0), ("forward", 11.0), ("backward", 13.0), ("optimizer", 16.0))
    enter_all(clock, ("losses", 20.0), ("between steps", 20.5), ("evaluation", 20.75), ("between steps", 90.0))
    enter_all(clock, ("data", 90.25), ("forward", 91.25), ("a stage of tomorrow", 93.25), ("between steps", 94.25))
    times = clock.take()
    assert times is not None
    assert (times.steps, times.wall) == (2, (10.5 + 0.25 + 0.25 + 4.0) / 2)
    assert times.parts == {
        "data": 1.0, "forward": 2.0, "backward": 1.5, "optimizer": 2.0, "communication": 0.25, "host": 0.75,
    }  # fmt: skip
    assert sum(times.parts.values()) == times.wall
    assert clock.take() is None


def test_stages_of_a_pipeline_have_their_parts() -> None:
    clock = StepClock(CPU)
    stages = ["load micro batch", "forward pass", "send activation", "recv grad", "backward pass", "reduce tied grads",
              "reduce grads", "optimizer step", "between steps"]  # fmt: skip
    enter_all(clock, ("data", 0.0), *((stage, float(number)) for number, stage in enumerate(stages, start=1)))
    times = clock.take()
    assert times is not None
    assert list(times.parts.values()) == [2.0, 1.0, 1.0, 1.0, 4.0, 0.0]


def test_a_collective_inside_a_stage_is_communication(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([1.5, 2.25])
    clock = StepClock(CPU)
    enter_all(clock, ("data", 0.0), ("backward", 1.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    with clock.communicating(), clock.communicating():
        pass
    enter_all(clock, ("optimizer", 3.0), ("between steps", 4.0))
    times = clock.take()
    assert times is not None
    assert [times.parts[part] for part in ("backward", "communication", "optimizer")] == [1.25, 0.75, 1.0]
    assert times.wall == sum(times.parts.values()) == 4.0


class Event:
    """Stands for a CUDA event: it completes when the test says so."""

    gpu_now = 0.0
    finished = -1.0

    def record(self) -> None:
        self.at = Event.gpu_now

    def query(self) -> bool:
        return self.at <= Event.finished

    def elapsed_time(self, other: Event) -> float:
        return 1000 * (other.at - self.at)


def step_on_a_gpu(clock: StepClock, start: float) -> None:
    """Data 1 s on the host; forward 2 s, backward 3 s, optimizer 1 s and losses 0.5 s on the GPU; reports 0.5 s."""
    for stage, host, gpu in (
        ("data", 0.0, 0.0), ("forward", 1.0, 1.0), ("backward", 1.1, 3.0), ("optimizer", 1.2, 6.0),
        ("losses", 1.3, 7.0),
    ):  # fmt: skip
        Event.gpu_now = start + gpu
        clock.enter(stage, start + host)
    Event.gpu_now = start + 7.5
    clock.reading_back()
    Event.gpu_now = start + 7.6
    clock.enter("between steps", start + 7.6)


def test_a_gpu_is_read_a_step_later_and_never_waited_for() -> None:
    clock = StepClock(CPU, Event)
    step_on_a_gpu(clock, 0.0)
    assert clock.take() is None
    step_on_a_gpu(clock, 8.0)
    Event.finished = 9.0
    times = clock.take()
    assert times is not None
    assert times.steps == 1
    assert times.parts == pytest.approx(
        {"data": 1.0, "forward": 2.0, "backward": 3.0, "optimizer": 1.0, "communication": 0.5, "host": 0.1}
    )
    Event.finished = 16.0
    later = clock.take()
    assert later is not None
    assert (later.wall, later.parts["host"]) == (pytest.approx(8.0), pytest.approx(0.5))


def test_a_host_that_runs_ahead_never_makes_parts_negative() -> None:
    clock = StepClock(CPU, Event)
    Event.finished = 100.0
    for stage, host, gpu in (("data", 0.0, 0.0), ("forward", 2.0, 1.0), ("between steps", 2.5, 9.0)):
        Event.gpu_now = gpu
        clock.enter(stage, host)
    times = clock.take()
    assert times is not None
    assert (times.wall, times.parts["forward"], times.parts["data"], times.parts["host"]) == (8.0, 8.0, 0.0, 0.0)


def test_listening_costs_microseconds() -> None:
    heartbeat, clock = Heartbeat(), StepClock(CPU)
    heartbeat.listener = clock.enter
    for number in range(100):
        heartbeat.begin_step(number)
        heartbeat.end_step()
    start = time.thread_time()
    for number in range(1000):
        heartbeat.begin_step(number)
        for stage in ("forward", "backward", "optimizer", "losses"):
            heartbeat.enter(stage)
        heartbeat.end_step()
    assert (time.thread_time() - start) / 1000 < 2e-4  # ten times what it takes; of this thread alone
    times = clock.take()
    assert times is not None
    assert set(times.parts) == set(PARTS)
