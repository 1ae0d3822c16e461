"""Workers die, hang and fail at any item: results come in order all the same, or the run ends with the reason."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import worker_functions

from data_tools.encoding import worker_pool
from data_tools.encoding.worker_pool import WorkerPool
from pretrain.errors import DataError, TacoError


def run(folder: Path, items: list[Any], workers: int = 2, **options: Any) -> list[Any]:
    with WorkerPool(worker_functions.squarer, str(folder), workers, **options) as pool:
        return list(pool.map(items))


def answers(items: list[Any]) -> list[Any]:
    return [item if isinstance(item, str) else (item * item, bytes(abs(item))) for item in items]


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order(tmp_path: Path, workers: int) -> None:
    items = [3, "work", *range(40), 3_000_000, "work", 1]  # one answer larger than any socket's buffer
    assert run(tmp_path, items, workers) == answers(items)
    assert run(tmp_path, [], workers) == []


def test_large_items_reach_the_worker(tmp_path: Path) -> None:
    items = ["x" * size for size in (5_000_000, 1, 3_000_000)] * 3
    assert run(tmp_path, items) == items


@pytest.mark.fault("preprocess")
@pytest.mark.parametrize(("word", "reason"), [("die", "was killed by SIGKILL"), ("leave", "ended with code 3")])
def test_items_of_dead_workers_are_done_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], word: str, reason: str
) -> None:
    items = [1, f"once {word}", *range(20), f"once  {word}".replace("  ", " ") + " again", 5]
    start = time.monotonic()
    assert run(tmp_path, items) == answers(items)
    assert time.monotonic() - start < 30
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: worker process")]
    assert warnings
    assert reason in warnings[0]
    assert "a new one does it again" in warnings[0]


@pytest.mark.fault("preprocess")
def test_an_item_that_kills_three_workers_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(TacoError, match=r"item die: 3 workers died over it.*SIGKILL; probably for lack of memory"):
        run(tmp_path, [*range(8), "die", *range(8)], describe=lambda item: f"item {item}")


@pytest.mark.slow
@pytest.mark.fault("preprocess")
def test_a_stopped_worker_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(worker_pool, "_IDLE_SECONDS", 1.5)
    items = [*range(5), "once stop", *range(5)]
    assert run(tmp_path, items) == answers(items)
    assert "did nothing for" in capfd.readouterr().err


@pytest.mark.fault("preprocess")
def test_an_item_that_takes_far_too_long_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(worker_pool, "_SLOW_SECONDS", 0.05)
    with pytest.raises(TacoError, match="endless: 3 workers died over it; the last one was too slow"):
        run(tmp_path, ["endless"])


@pytest.mark.parametrize("workers", [1, 2])
def test_failures_come_at_their_place(tmp_path: Path, workers: int) -> None:
    for word, error, match in (
        ("mistake", DataError, "^line 7 is wrong$"),
        ("bug", RuntimeError, "KeyError: 'bug'"),
        ("memory", TacoError, "ran out of memory"),
    ):
        with WorkerPool(worker_functions.squarer, str(tmp_path), workers) as pool:
            results = pool.map(["work", 1, word, 2])
            assert next(results) == "work"
            assert next(results) == (1, b"\0")
            with pytest.raises(error, match=match):
                next(results)


def test_an_error_of_the_source_comes_after_what_it_gave(tmp_path: Path) -> None:
    def source() -> Iterator[Any]:
        yield from ("work", 2)
        raise DataError("the file is cut off")

    with WorkerPool(worker_functions.squarer, str(tmp_path), 2) as pool:
        results = pool.map(source())
        assert [next(results), next(results)] == answers(["work", 2])
        with pytest.raises(DataError, match="cut off"):
            next(results)


def test_workers_that_cannot_start_end_the_run() -> None:
    with (
        WorkerPool(worker_functions.unbuildable, "vocab.txt", 2) as pool,
        pytest.raises(DataError, match="vocab.txt cannot be loaded"),
    ):
        list(pool.map([1, 2]))
    with (
        WorkerPool(worker_functions.dying, "vocab.txt", 2) as pool,
        pytest.raises(TacoError, match="3 worker processes in a row ended with code 9 while starting"),
    ):
        list(pool.map([1, 2]))


def test_items_ahead_are_bounded_in_number_and_bytes(tmp_path: Path) -> None:
    given = 0

    def source(count: int) -> Iterator[int]:
        nonlocal given
        for number in range(count):
            given += 1
            yield number

    for options, most in (({}, 2 * 3 + 1), ({"item_bytes": lambda item: 10, "max_bytes_ahead": 20}, 3)):
        given = 0
        with WorkerPool(worker_functions.squarer, str(tmp_path), 2, **options) as pool:
            for taken, _ in enumerate(pool.map(source(60))):
                assert given - taken <= most


def test_a_process_starts_only_if_there_is_work_for_it(tmp_path: Path) -> None:
    with WorkerPool(worker_functions.squarer, str(tmp_path), 3) as pool:
        assert list(pool.map(["work"] * 2)) == ["work"] * 2
        assert len(pool._workers) == 2


def test_no_process_is_left(tmp_path: Path) -> None:
    with WorkerPool(worker_functions.squarer, str(tmp_path), 3) as pool:
        assert next(pool.map(["work"] * 9)) == "work"
        pids = [worker.pid for worker in pool._workers]
    assert len(set(pids)) == 3
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
