"""Index tables on disk: found again, built once by many processes, damage noticed, folders that refuse passed over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from project import ROOT

from pretrain.data import index_cache
from pretrain.data.index_cache import cached, read_tables, write_tables
from pretrain.errors import DataError

FACTS = {"seq_length": 64, "content": "ab"}


def tables() -> dict[str, np.ndarray]:
    return {
        "starts": np.arange(1000, dtype=np.uint32),
        "windows": np.arange(6).reshape(2, 3),
        "none": np.empty(0, np.uint16),
    }


class Maker:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, np.ndarray]:
        self.calls += 1
        return tables()


def assert_equal(found: dict[str, np.ndarray] | None) -> None:
    assert found is not None
    assert list(found) == list(tables())
    for name, array in tables().items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert np.array_equal(found[name], array)


def only_file(folder: Path) -> Path:
    (path,) = folder.glob("*.index")
    return path


def test_tables_are_built_once_and_then_mapped(tmp_path: Path) -> None:
    make = Maker()
    for _ in range(3):
        found = cached("pack", FACTS, make, [tmp_path / "a.index"])
        assert_equal(found)
        assert not found["starts"].flags.writeable
        assert found["starts"].ctypes.data % 8 == 0
    assert make.calls == 1
    cached("pack", {**FACTS, "seq_length": 65}, make, [tmp_path / "a.index"])
    assert make.calls == 2
    assert not list(tmp_path.glob("a.index/.*.tmp"))


@pytest.mark.fault("index-race")
def test_every_flipped_bit_and_every_cut_is_noticed_and_the_file_built_again(tmp_path: Path) -> None:
    cached("pack", FACTS, Maker(), [tmp_path])
    path = only_file(tmp_path)
    good = path.read_bytes()
    generator = np.random.default_rng(1)
    places = [*range(120), *generator.integers(0, len(good), 60).tolist(), len(good) - 1]
    damaged = [good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :] for place in places]
    damaged += [good[:place] for place in (0, 1, 8, 23, 24, 25, 200, len(good) - 1)] + [good + b"\0"]
    for content in damaged:
        path.write_bytes(content)
        assert read_tables(path, {"version": 1, "name": "pack", **FACTS}) is None
    make = Maker()
    assert_equal(cached("pack", FACTS, make, [tmp_path]))
    assert make.calls == 1
    assert path.read_bytes() == good


def test_a_file_of_other_facts_is_not_taken(tmp_path: Path) -> None:
    write_tables(tmp_path / "x.index", {"a": 1}, tables())
    assert_equal(read_tables(tmp_path / "x.index", {"a": 1}))
    assert read_tables(tmp_path / "x.index", {"a": 2}) is None


def test_folders_that_refuse_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    make = Maker()
    assert_equal(cached("pack", FACTS, make, [blocked / "x", tmp_path / "second"]))
    assert only_file(tmp_path / "second").exists()
    assert_equal(cached("pack", FACTS, make, [blocked / "x"]))
    assert make.calls == 2


@pytest.mark.fault("index-race")
def test_a_full_disk_leaves_nothing_and_the_tables_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index_cache.os, "fsync", full)
    make = Maker()
    assert_equal(cached("pack", FACTS, make, [tmp_path]))
    assert make.calls == 1
    assert not list(tmp_path.glob("*.index")) + list(tmp_path.glob(".*.tmp"))
    with pytest.raises(DataError, match=r"cannot be written: No space left on device; .*--index-cache"):
        cached("pack", FACTS, make, [tmp_path], must_store=True)


def test_a_file_that_may_not_be_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_: Path) -> memoryview:
        raise PermissionError(13, "Permission denied")

    cached("pack", FACTS, Maker(), [tmp_path])
    monkeypatch.setattr(index_cache, "_map", refuse)
    assert read_tables(only_file(tmp_path), {}) is None
    assert "cannot be read (Permission denied)" in caplog.text
    assert "damaged" not in caplog.text


def test_without_locks_everyone_builds_and_the_result_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(index_cache.fcntl, "flock", unsupported)
    assert_equal(cached("pack", FACTS, Maker(), [tmp_path]))
    assert only_file(tmp_path).exists()


RACER = textwrap.dedent(
    """
    import os, sys, time
    from pathlib import Path
    import numpy as np
    from pretrain.data.index_cache import cached

    folder = Path(sys.argv[1])

    def make():
        (folder / f"built-by-{os.getpid()}").touch()
        time.sleep(float(sys.argv[2]))
        return {"starts": np.arange(200_000, dtype=np.uint32)}

    while not (folder / "go").exists():
        time.sleep(0.001)
    found = cached("sentence", {"content": "x"}, make, [folder / "index"])
    assert np.array_equal(found["starts"], np.arange(200_000))
    """
)


def start_racers(folder: Path, count: int, seconds: float) -> list[subprocess.Popen]:
    root = ROOT
    return [
        subprocess.Popen(
            [sys.executable, "-c", RACER, folder, str(seconds)], env={**os.environ, "PYTHONPATH": str(root)}
        )
        for _ in range(count)
    ]


@pytest.mark.fault("index-race")
def test_of_four_processes_one_builds(tmp_path: Path) -> None:
    racers = start_racers(tmp_path, 4, 0.3)
    (tmp_path / "go").touch()
    assert [racer.wait(60) for racer in racers] == [0] * 4
    assert len(list(tmp_path.glob("built-by-*"))) == 1


@pytest.mark.fault("index-race")
def test_when_the_builder_is_killed_the_next_one_builds(tmp_path: Path) -> None:
    racers = start_racers(tmp_path, 3, 2.0)
    (tmp_path / "go").touch()
    while not (built := list(tmp_path.glob("built-by-*"))):
        assert all(racer.poll() is None for racer in racers)
    victim = int(built[0].name.rsplit("-", 1)[1])
    os.kill(victim, signal.SIGKILL)
    codes = {racer.pid: racer.wait(60) for racer in racers}
    assert codes.pop(victim) == -signal.SIGKILL
    assert set(codes.values()) == {0}
    assert len(list(tmp_path.glob("built-by-*"))) == 2
