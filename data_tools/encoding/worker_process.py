"""Both ends of a worker process: the handle in the parent, and the loop in the child.

Messages are a length (8 bytes) and a pickle: parent and child are the same program, and no other process can reach the
socket. The child first gets the factory of its callable and answers None once it is built; then it gets items with
their numbers.
"""

from __future__ import annotations

import os
import pickle
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pretrain.errors import TacoError

_HEADER = struct.Struct("<Q")
_SOCKET_BYTES = 1 << 20
# -c puts the current folder on the path; the parent's path replaces it before anything is imported.
_BOOTSTRAP = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from data_tools.encoding.worker_process import serve; serve(int(sys.argv[1]))"
)


@dataclass(frozen=True)
class Failure:
    """What a worker raised instead of returning a result."""

    cause: TacoError | None
    text: str

    def error(self) -> Exception:
        """The exception to raise in the parent: the user's error itself, or a bug with the worker's traceback."""
        return self.cause if self.cause is not None else RuntimeError(f"a worker process failed:\n{self.text}")


class WorkerHandle:
    """The parent's end: starts the child, never blocks, and keeps the child's tasks."""

    def __init__(self, factory: Callable[[Any], Callable[[Any], Any]], argument: Any) -> None:
        self.socket, theirs = socket.socketpair()
        for end in (self.socket, theirs):
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                end.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BYTES)
        command = [sys.executable, "-c", _BOOTSTRAP, str(theirs.fileno()), *sys.path]
        with theirs:
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self.socket.setblocking(False)
        self.pid = self._process.pid
        self.tasks: deque[Any] = deque()
        self.is_ready = False
        self._outgoing: deque[memoryview] = deque()
        self._incoming, self._filled = memoryview(bytearray(_HEADER.size)), 0
        self._is_header = True
        self._busy_since = self._alive_at = time.monotonic()
        self._cpu_ticks = -1
        self._queue((factory, argument))

    def interest(self) -> int:
        """Events to wait for: always answers, and room to write if there is something to send."""
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outgoing else 0)

    def assign(self, task: Any, number: int, item: Any) -> None:
        """Queues `item` and appends `task` to `tasks`, the first of which the child is processing."""
        if not self.tasks and self.is_ready:
            self.forgive()
        self.tasks.append(task)
        self._queue((number, item))

    def finish_task(self) -> tuple[Any, float]:
        """Removes the answered task from the queue; returns it with the seconds it took."""
        seconds = self.busy_seconds()
        self.forgive()
        return self.tasks.popleft(), seconds

    def forgive(self) -> None:
        """Restarts the clocks of `busy_seconds` and `idle_seconds`."""
        self._busy_since = self._alive_at = time.monotonic()

    def busy_seconds(self) -> float:
        """Seconds since the child began its task, or since it was started."""
        return time.monotonic() - self._busy_since

    def idle_seconds(self) -> float:
        """Seconds for which the child has used no CPU time; 0 if the system does not report it."""
        ticks = _cpu_ticks(self.pid)
        if ticks is None or ticks != self._cpu_ticks:
            self._cpu_ticks = -1 if ticks is None else ticks
            self._alive_at = time.monotonic()
        return time.monotonic() - self._alive_at

    def send_more(self) -> None:
        """Sends as much as the socket accepts now. Raises ConnectionError: the child is gone."""
        while self._outgoing:
            try:
                sent = self.socket.send(self._outgoing[0])
            except BlockingIOError:
                return
            self._outgoing[0] = self._outgoing[0][sent:]
            if not self._outgoing[0]:
                self._outgoing.popleft()

    def receive(self) -> Iterator[Any]:
        """The messages received completely so far. Raises EOFError or ConnectionError: the child is gone."""
        while True:
            try:
                count = self.socket.recv_into(self._incoming[self._filled :])
            except BlockingIOError:
                return
            if count == 0:
                raise EOFError
            self._filled += count
            if self._filled < len(self._incoming):
                continue
            message, self._filled = self._incoming, 0
            self._is_header = not self._is_header
            if self._is_header:
                self._incoming = memoryview(bytearray(_HEADER.size))
                answer = pickle.loads(message)  # noqa: S301 - from our own child
                if answer is None:
                    self.is_ready = True
                    self.forgive()
                yield answer
            else:
                self._incoming = memoryview(bytearray(_HEADER.unpack(message)[0]))

    def end(self) -> int:
        """Kills the child if it is alive, waits for it, and returns its exit code, negative for a signal."""
        self.socket.close()
        self._process.kill()  # a child that is already exiting keeps its own code
        return self._process.wait()

    def _queue(self, message: Any) -> None:
        data = pickle.dumps(message, protocol=5)
        self._outgoing += [memoryview(_HEADER.pack(len(data))), memoryview(data)]


def serve(descriptor: int) -> None:
    """The child: builds its callable, then processes items until the parent closes the socket or dies."""
    # They reach the whole process group; the parent decides.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(fileno=descriptor)
    threading.Thread(target=_end_with_parent, args=(descriptor,), daemon=True).start()
    with connection, suppress(EOFError, ConnectionError):
        factory, argument = _read_message(connection)
        handle = _attempt(lambda: factory(argument))
        _write_message(connection, (-1, handle) if isinstance(handle, Failure) else None)
        while not isinstance(handle, Failure):
            number, item = _read_message(connection)
            _write_message(connection, (number, _attempt(lambda item=item: handle(item))))  # type: ignore[misc]


def _attempt(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except TacoError as error:
        return Failure(error, str(error))
    except MemoryError:
        return Failure(TacoError("a worker process ran out of memory; take fewer --workers, or shorter documents"), "")
    except Exception:  # noqa: BLE001 - it is raised again in the parent
        return Failure(None, traceback.format_exc())


def _end_with_parent(descriptor: int) -> None:
    """Ends this process when the parent dies: a killed parent cannot do it, and a busy worker would notice late."""
    poller = select.poll()
    poller.register(descriptor, select.POLLHUP | select.POLLERR)
    poller.poll()
    os._exit(1)


def _read_message(connection: socket.socket) -> Any:
    return pickle.loads(_read_exactly(connection, _HEADER.unpack(_read_exactly(connection, _HEADER.size))[0]))  # noqa: S301 - from our own parent


def _read_exactly(connection: socket.socket, size: int) -> memoryview:
    data, filled = memoryview(bytearray(size)), 0
    while filled < size:
        count = connection.recv_into(data[filled:])
        if count == 0:
            raise EOFError
        filled += count
    return data


def _write_message(connection: socket.socket, message: Any) -> None:
    data = pickle.dumps(message, protocol=5)
    connection.sendall(_HEADER.pack(len(data)))
    connection.sendall(data)


def _cpu_ticks(pid: int) -> int | None:
    """CPU time of a process in clock ticks; None if the system has no /proc."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return int(fields[11]) + int(fields[12])
