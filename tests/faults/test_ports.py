"""Ports: one that is taken, several runs on one machine, and what a run listens on."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import psutil
import pytest
from live_ranks import LiveRanks, live_ranks
from small_runs import write_small_run

pytestmark = pytest.mark.slow


def write_run(folder: Path, steps: int) -> Path:
    folder.mkdir()
    return write_small_run(folder, train__steps=steps)


@pytest.mark.fault("port")
def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with live_ranks(2, write_run(tmp_path / "run", 8), port=port) as ranks:
            ranks.wait_until(lambda: ranks.code(0) is not None)
            assert ranks.code(0) == 1, ranks.output()
            (line,) = ranks.errors(0)
    assert f"the port of 127.0.0.1:{port}" in line
    assert "--rdzv-endpoint localhost:0" in line
    assert not (tmp_path / "run" / "run").exists()


@pytest.mark.fault("port")
def test_runs_on_one_machine_do_not_meet(tmp_path: Path) -> None:
    """Two of two ranks, at a port each, and one that is alone and needs none, all at once."""
    configs = [write_run(tmp_path / name, 8) for name in ("a", "b", "c")]
    with live_ranks(2, configs[0]) as a, live_ranks(2, configs[1]) as b, live_ranks(1, configs[2]) as c:
        assert [a.wait(), b.wait(), c.wait()] == [[0, 0], [0, 0], [0]]


def listening(ranks: LiveRanks) -> set[tuple[str, int]]:
    """Addresses and ports on which the processes of a run wait for others; what the test itself has open is no part."""
    inherited = {connection.laddr for connection in psutil.Process().net_connections("inet")}
    return {
        (str(connection.laddr.ip), int(connection.laddr.port))
        for pid in ranks.pids
        for connection in psutil.Process(pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and connection.laddr not in inherited
    }


def use_loopback(rank: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"


def test_what_a_run_listens_on(tmp_path: Path) -> None:
    """The meeting point of several ranks on every interface; everything else on the one that is configured."""
    for world_size in (1, 2):
        config = write_run(tmp_path / str(world_size), 100_000)
        with live_ranks(world_size, config, before=use_loopback) as ranks:
            ranks.wait_for_step(1)
            found = listening(ranks)
        everywhere = {port for address, port in found if address in ("::", "0.0.0.0")}
        assert len(everywhere) == world_size - 1  # MASTER_PORT, by rank 0
        local = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
        assert all(address in local for address, port in found if port not in everywhere), found
