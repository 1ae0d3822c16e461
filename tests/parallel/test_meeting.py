"""Where ranks meet: what is refused before, who is missing while they wait, and how long they do."""

from __future__ import annotations

import dataclasses
import threading
import time
from datetime import timedelta

import pytest
from forked import free_port
from torch.distributed import TCPStore

from pretrain.errors import ConfigError
from pretrain.parallel import meeting
from pretrain.parallel.meeting import MeetingError, Party, check_interfaces, meet, read_address


def host(size: int = 2, address: str = "127.0.0.1") -> Party:
    return Party("rank", 0, size, address, free_port(), is_host=True, speaks=True)


def guest(of: Party, index: int) -> Party:
    return dataclasses.replace(of, index=index, is_host=False)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "MASTER_ADDR, MASTER_PORT missing"),
        ({"MASTER_ADDR": "node1"}, "MASTER_PORT missing"),
        ({"MASTER_ADDR": "node1", "MASTER_PORT": "ninety"}, "MASTER_PORT=ninety is no port"),
        ({"MASTER_ADDR": "node1", "MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port"),
    ],
)
def test_an_incomplete_address_is_refused(variables: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_address(variables)


@pytest.mark.parametrize(
    ("variables", "use_nccl", "unknown"),
    [
        ({"GLOO_SOCKET_IFNAME": "lo"}, False, None),
        ({"GLOO_SOCKET_IFNAME": "nonsense0"}, False, "GLOO_SOCKET_IFNAME=nonsense0"),
        ({"GLOO_SOCKET_IFNAME": "lo,nonsense0"}, False, "GLOO_SOCKET_IFNAME"),
        ({"NCCL_SOCKET_IFNAME": "nonsense"}, False, None),
        ({"NCCL_SOCKET_IFNAME": "nonsense"}, True, "NCCL_SOCKET_IFNAME=nonsense"),
        ({"NCCL_SOCKET_IFNAME": "l"}, True, None),  # the beginning of a name
        ({"NCCL_SOCKET_IFNAME": "=l"}, True, "NCCL_SOCKET_IFNAME"),
        ({"NCCL_SOCKET_IFNAME": "^docker"}, True, None),
    ],
)
def test_an_unknown_network_interface_is_named(variables: dict[str, str], use_nccl: bool, unknown: str | None) -> None:
    if unknown is None:
        check_interfaces(use_nccl=use_nccl, environment=variables)
        return
    with pytest.raises(ConfigError, match="it has lo") as refused:
        check_interfaces(use_nccl=use_nccl, environment=variables)
    assert unknown in str(refused.value)


@pytest.mark.parametrize("address", ["nowhere.invalid", "no..name", "x" * 70])
def test_a_name_that_nobody_knows(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_RESOLVE_SECONDS", 0.0)
    with pytest.raises(MeetingError, match=f"MASTER_ADDR {address}"):
        meet(host(address=address), timedelta(seconds=5))


def test_who_is_missing_is_said_with_the_time_left(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "FIRST_WORDS_SECONDS", 0.05)
    monkeypatch.setattr(meeting, "LATER_WORDS_SECONDS", 0.05)
    first = host(size=3)
    stores: list[TCPStore] = []

    def come(party: Party, after: str) -> None:
        end = time.monotonic() + 20
        while after not in caplog.text and time.monotonic() < end:
            time.sleep(0.01)
        stores.append(meet(party, timedelta(seconds=60)))

    no_answer = f"waiting for an answer at {first.place}, where rank 0 should be, "
    third_is_missing = f"waiting for 1 of 3 ranks (2) at {first.place}, "
    moments = ((guest(first, 1), ""), (first, no_answer), (guest(first, 2), third_is_missing))
    threads = [threading.Thread(target=come, args=moment) for moment in moments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores) == 3
    assert no_answer in caplog.text
    assert third_is_missing in caplog.text
    assert " s left" in caplog.text


def test_those_who_have_not_come_in_time_are_named() -> None:
    with pytest.raises(MeetingError, match=r"2 of 3 ranks \(1, 2\) have not come to .* within 1 s"):
        meet(host(size=3), timedelta(seconds=1))


def test_no_answer_in_time() -> None:
    first = host()
    with pytest.raises(MeetingError, match=f"no answer at {first.place} within 1 s.*rank 0 has not started there"):
        meet(guest(first, 1), timedelta(seconds=1))
