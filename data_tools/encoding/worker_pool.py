"""Worker processes that may die or hang at any time: every item is processed, and results come back in order.

Each worker has its own socket, so that a killed one can neither block nor corrupt what others send. The parent never
blocks on one worker: it waits for all of them together, notices a death as soon as the system closes the socket, starts
a new worker and gives it the lost items. Workers are started without fork, since the parent may have threads, and end
with the parent however it ends. One starts when an item finds all others busy: a start costs more than a small corpus.
"""

from __future__ import annotations

import selectors
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from data_tools.encoding.worker_process import Failure, WorkerHandle
from pretrain.errors import TacoError

# Items ahead of the consumer: enough that no worker waits, few enough to save memory.
_ITEMS_PER_WORKER = 3
_QUEUED_PER_WORKER = 2
_MAX_KILLS = 3
_MAX_FAILED_STARTS = 3
_POLL_SECONDS = 0.2
_LOOK_SECONDS = 1.0
# A worker that uses no CPU time for this long is stopped or stuck; a busy one may be slow, up to the second limit.
_IDLE_SECONDS = 60.0
_SLOW_SECONDS = 1800.0
_SLOW_FACTOR = 50.0


class Task:
    """An item in progress: its number in the order, and how many workers died while processing it."""

    def __init__(self, number: int, item: Any, num_bytes: int) -> None:
        self.number, self.item, self.num_bytes = number, item, num_bytes
        self.kills = 0


class WorkerPool:
    """Up to `count` processes that apply `factory(argument)` to items; use it as a context manager.

    `factory` is a module-level function, `argument` is picklable: each worker builds its own callable from them.
    """

    def __init__(
        self,
        factory: Callable[[Any], Callable[[Any], Any]],
        argument: Any,
        count: int,
        *,
        describe: Callable[[Any], str] = str,
        item_bytes: Callable[[Any], int] = lambda item: 0,
        max_bytes_ahead: int = 256 << 20,
        check_stop: Callable[[], None] = lambda: None,
    ) -> None:
        """`describe` names an item in messages; the `item_bytes` of items ahead of the consumer stay below
        `max_bytes_ahead` (one item is always allowed); `check_stop` is called often and may raise."""
        self._factory, self._argument, self._count = factory, argument, count
        self._describe, self._item_bytes, self._max_bytes = describe, item_bytes, max_bytes_ahead
        self._check_stop = check_stop
        self._selector = selectors.DefaultSelector()
        self._workers: list[WorkerHandle] = []
        self._waiting: deque[Task] = deque()
        self._results: dict[int, Any] = {}
        self._failed_starts = 0
        self._slowest = 0.0
        self._last_look = time.monotonic()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.end()
        self._selector.close()

    def map(self, items: Iterable[Any]) -> Iterator[Any]:
        """Results of `items`, in order; an error in `items` is raised after the results of the items before it.

        Raises:
            TacoError: a worker raised it, an item killed three workers, or workers do not start.
        """
        source, num_read, num_returned, bytes_ahead = iter(items), 0, 0, 0
        sizes: dict[int, int] = {}
        failure: TacoError | None = None
        is_exhausted = False
        while True:
            while not is_exhausted and self._has_room(num_read - num_returned, bytes_ahead):
                try:
                    item = next(source)
                except StopIteration:
                    is_exhausted = True
                    break
                except TacoError as error:
                    failure, is_exhausted = error, True
                    break
                sizes[num_read] = self._item_bytes(item)
                bytes_ahead += sizes[num_read]
                self._waiting.append(Task(num_read, item, sizes[num_read]))
                num_read += 1
                self._hand_out()
            self._hand_out()
            while num_returned in self._results:
                result = self._results.pop(num_returned)
                bytes_ahead -= sizes.pop(num_returned)
                num_returned += 1
                if isinstance(result, Failure):
                    raise result.error()
                yield result
            if is_exhausted and num_returned == num_read:
                break
            if is_exhausted or not self._has_room(num_read - num_returned, bytes_ahead):
                self._wait(_POLL_SECONDS)
            else:
                self._wait(0)
        if failure is not None:
            raise failure

    def _has_room(self, num_ahead: int, bytes_ahead: int) -> bool:
        return num_ahead == 0 or (num_ahead < self._count * _ITEMS_PER_WORKER and bytes_ahead < self._max_bytes)

    def _start_worker(self) -> None:
        worker = WorkerHandle(self._factory, self._argument)
        self._workers.append(worker)
        self._selector.register(worker.socket, worker.interest(), worker)

    def _hand_out(self) -> None:
        while self._waiting:
            if len(self._workers) < self._count and all(worker.tasks for worker in self._workers):
                self._start_worker()
            worker = min(self._workers, key=lambda worker: len(worker.tasks))
            if len(worker.tasks) >= _QUEUED_PER_WORKER:
                return
            task = self._waiting.popleft()
            worker.assign(task, task.number, task.item)
            self._selector.modify(worker.socket, worker.interest(), worker)

    def _wait(self, seconds: float) -> None:
        """Sends and receives what is ready, waiting at most `seconds`, then checks the workers."""
        self._check_stop()
        for key, events in self._selector.select(seconds):
            worker: WorkerHandle = key.data
            try:
                if events & selectors.EVENT_WRITE:
                    worker.send_more()
                    self._selector.modify(worker.socket, worker.interest(), worker)
                if events & selectors.EVENT_READ:
                    self._receive(worker)
            except (EOFError, ConnectionError):
                self._replace(worker, "")
        now = time.monotonic()
        if now - self._last_look >= _LOOK_SECONDS:
            # If this process itself was suspended, the workers' idle time does not count.
            if now - self._last_look > 2 * _LOOK_SECONDS + 5:
                for worker in self._workers:
                    worker.forgive()
            self._last_look = now
            self._end_hung_workers()

    def _receive(self, worker: WorkerHandle) -> None:
        for answer in worker.receive():
            if answer is None:  # the worker is ready
                self._failed_starts = 0
                continue
            if answer[0] < 0:  # the worker's callable could not be built
                raise answer[1].error()
            task, seconds = worker.finish_task()
            self._slowest = max(self._slowest, seconds)
            self._results[task.number] = answer[1]

    def _end_hung_workers(self) -> None:
        slow = max(_SLOW_SECONDS, _SLOW_FACTOR * self._slowest)
        for worker in list(self._workers):
            if worker.tasks or not worker.is_ready:
                idle, busy = worker.idle_seconds(), worker.busy_seconds() if worker.is_ready else 0.0
                if idle > _IDLE_SECONDS or busy > slow:
                    self._replace(worker, f"did nothing for {idle:.0f} s" if idle > _IDLE_SECONDS else "was too slow")

    def _replace(self, worker: WorkerHandle, complaint: str) -> None:
        """Ends `worker`, dead or hung, and starts another one that processes its items again."""
        self._selector.unregister(worker.socket)
        self._workers.remove(worker)
        code = worker.end()
        reason = complaint or (_signal_name(-code) if code < 0 else f"ended with code {code}")
        if not worker.is_ready:
            self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS:
                raise TacoError(f"{self._failed_starts} worker processes in a row {reason} while starting; {_MEMORY}")
        elif worker.tasks:
            worker.tasks[0].kills += 1
        what = self._describe(worker.tasks[0].item) if worker.tasks else "nothing"
        if worker.tasks and worker.tasks[0].kills >= _MAX_KILLS:
            raise TacoError(f"{what}: {_MAX_KILLS} workers died over it; the last one {reason}; {_MEMORY}")
        print(
            f"warning: worker process {worker.pid} {reason} at {what}; a new one does it again",
            file=sys.stderr,
            flush=True,
        )
        self._waiting.extendleft(reversed(worker.tasks))
        self._start_worker()


_MEMORY = "probably for lack of memory: take fewer --workers, or give the job more"


def _signal_name(number: int) -> str:
    try:
        return f"was killed by {signal.Signals(number).name}"
    except ValueError:
        return f"was killed by signal {number}"
