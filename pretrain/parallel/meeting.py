"""Where processes of a run meet: a store at one address, and what is said there while some of them have not come.

Ranks meet here before they form process groups, and launchers of several nodes before they start ranks.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from pretrain.errors import ConfigError, TacoError
from pretrain.runlog import get_logger

if TYPE_CHECKING:
    from torch.distributed import TCPStore

# A start from a slow disk is not worth a word; then often enough to be believed, and seldom enough to be read.
FIRST_WORDS_SECONDS = 5.0
LATER_WORDS_SECONDS = 30.0
_RESOLVE_SECONDS = 5.0
_NAMED = 8

log = get_logger(__name__)


class MeetingError(TacoError):
    """The processes of a run have not met."""


@dataclass(frozen=True)
class Party:
    """Who meets where: `size` processes that are called `noun` ("rank"), of which this one is number `index`.

    `is_host`: the store runs in this process; the others are its clients.
    `speaks`: says what it waits for while there is no contact; one per machine is enough.
    """

    noun: str
    index: int
    size: int
    address: str
    port: int
    is_host: bool
    speaks: bool
    round: str = "0"

    @property
    def place(self) -> str:
        """Address and port for messages."""
        return f"{self.address}:{self.port}"


def read_address(environment: Mapping[str, str] | None = None) -> tuple[str, int]:
    """The meeting point that the launcher set: MASTER_ADDR and MASTER_PORT.

    Raises:
        ConfigError: one is missing, or the port is not one.
    """
    variables = os.environ if environment is None else environment
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not variables.get(name)]
    if missing:
        raise ConfigError(
            f"environment: {', '.join(missing)} missing, so ranks cannot meet; set {' and '.join(missing)} alike for "
            "all of them, or start with `taco train --processes N` or torchrun"
        )
    return variables["MASTER_ADDR"], _port(variables["MASTER_PORT"])


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 1 << 16):
        raise ConfigError(f"environment: MASTER_PORT={text} is no port; give a whole number from 1024 to 65535")
    return int(text)


def check_interfaces(*, use_nccl: bool, environment: Mapping[str, str] | None = None) -> None:
    """Refuse names of network interfaces that this machine does not have, before a library does in its own words.

    Raises:
        ConfigError: GLOO_SOCKET_IFNAME or, with NCCL, NCCL_SOCKET_IFNAME names none that is there.
    """
    variables = os.environ if environment is None else environment
    there = [name for _, name in socket.if_nameindex()]
    gloo = variables.get("GLOO_SOCKET_IFNAME", "")
    unknown = [name for name in gloo.split(",") if name and name not in there]
    if unknown:
        raise ConfigError(_no_interface("GLOO_SOCKET_IFNAME", gloo, there))
    nccl = variables.get("NCCL_SOCKET_IFNAME", "")
    if use_nccl and nccl and not nccl.startswith("^"):  # "^docker": all but these
        wanted = nccl.removeprefix("=").split(",")
        is_exact = nccl.startswith("=")
        if not any(name == want if is_exact else name.startswith(want) for name in there for want in wanted):
            raise ConfigError(_no_interface("NCCL_SOCKET_IFNAME", nccl, there))


def _no_interface(variable: str, value: str, there: list[str]) -> str:
    return (
        f"environment: {variable}={value}: {socket.gethostname()} has no such network interface; it has "
        f"{', '.join(there)}; set one of them, or unset {variable}"
    )


def meet(party: Party, timeout: timedelta) -> TCPStore:
    """Wait until all have come, and say from time to time who is missing and how long it may take; returns the store.

    Raises:
        MeetingError: the address cannot be resolved, or not all have come in time.
        RuntimeError: torch's, if the port is taken.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    _resolve(party)
    store = _open_store(party, timeout)
    try:
        _wait_for_all(store, party, deadline, timeout)
    except RuntimeError as error:
        raise _lost(party, error) from error
    return store


def _resolve(party: Party) -> None:
    """A name service that is busy for a moment, as when a thousand ranks ask at once, is asked again."""
    end = time.monotonic() + _RESOLVE_SECONDS
    while True:
        try:
            socket.getaddrinfo(party.address, party.port)
        except OSError as error:
            if time.monotonic() > end:
                raise MeetingError(
                    f"MASTER_ADDR {party.address}: {socket.gethostname()} cannot resolve this name "
                    f"({error.strerror or error}); set a name or an address that every node knows"
                ) from None
        except UnicodeError:
            raise MeetingError(
                f"MASTER_ADDR {party.address}: is no name of a host; set one that all nodes know"
            ) from None
        else:
            return
        time.sleep(0.5)


def _open_store(party: Party, timeout: timedelta) -> TCPStore:
    from torch.distributed import DistNetworkError, DistStoreError, TCPStore

    def missing() -> str:
        return f"waiting for an answer at {party.place}, where {party.noun} 0 should be"

    try:
        with _words_while_waiting(missing if party.speaks else None, timeout.total_seconds()):
            return TCPStore(
                party.address,
                party.port,
                party.size,
                party.is_host,
                timeout,
                wait_for_workers=False,
                multi_tenant=True,
                use_libuv=os.environ.get("USE_LIBUV", "1") == "1",
            )
    except (DistNetworkError, DistStoreError) as error:
        if "EADDRINUSE" in str(error) or party.is_host:
            raise
        raise MeetingError(
            f"no answer at {party.place} within {timeout.total_seconds():.0f} s ({_short(error)}): {party.noun} 0 has "
            f"not started there, or {socket.gethostname()} cannot reach it; look for its first line, then at "
            "MASTER_ADDR, MASTER_PORT and firewalls"
        ) from error


def _wait_for_all(store: TCPStore, party: Party, deadline: float, timeout: timedelta) -> None:
    def key(index: int) -> str:
        return f"taco/{party.noun}/{party.round}/{index}"

    counter = f"taco/{party.noun}/{party.round}/count"
    store.set(key(party.index), socket.gethostname())
    store.add(counter, 1)
    pause, words_at = 0.02, time.monotonic() + FIRST_WORDS_SECONDS
    while store.add(counter, 0) < party.size:
        now = time.monotonic()
        if now > deadline:
            missing = [index for index in range(party.size) if not store.check([key(index)])]
            raise MeetingError(
                f"{_some_of(missing, party)} have not come to {party.place} within {timeout.total_seconds():.0f} s; "
                "look for their first lines: they have not started, have ended, or cannot reach this address"
            )
        if now > words_at:
            words_at = now + LATER_WORDS_SECONDS
            missing = [index for index in range(party.size) if not store.check([key(index)])]
            if missing and not any(index not in missing for index in range(party.index)):  # the first that is here
                _tell(
                    party.index, f"waiting for {_some_of(missing, party)} at {party.place}, {deadline - now:.0f} s left"
                )
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


def _some_of(missing: list[int], party: Party) -> str:
    """Such as `2 of 8 ranks (3, 5)`."""
    named = ", ".join(str(index) for index in missing[:_NAMED])
    more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
    return f"{len(missing)} of {party.size} {party.noun}s ({named}{more})"


def _tell(index: int, text: str) -> None:
    if index == 0:
        log.warning("%s", text)
    else:
        log.error("%s", text)  # the level at which others than the first are heard


@contextmanager
def _words_while_waiting(text: Callable[[], str] | None, seconds: float) -> Iterator[None]:
    """Inside this context, in which the main thread is in C++, say `text` from time to time, with the time left."""
    if text is None:
        yield
        return
    is_over, start = threading.Event(), time.monotonic()

    def speak() -> None:
        pause = FIRST_WORDS_SECONDS
        while not is_over.wait(pause):
            log.error("%s, %.0f s left", text(), max(0.0, start + seconds - time.monotonic()))
            pause = LATER_WORDS_SECONDS

    speaker = threading.Thread(target=speak, name="taco-waiting", daemon=True)
    speaker.start()
    try:
        yield
    finally:
        is_over.set()
        speaker.join(timeout=1)


def _lost(party: Party, error: RuntimeError) -> MeetingError:
    lost = MeetingError(f"lost contact with {party.place} while waiting for all {party.noun}s: {_short(error)}")
    lost.is_consequence = True
    return lost


def _short(error: Exception) -> str:
    """The first sentence of torch's message; stacks of C++ follow it."""
    return " ".join(str(error).split()).partition(". ")[0][:200]
