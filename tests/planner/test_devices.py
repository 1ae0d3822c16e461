"""The table of GPUs: every entry is whole, names find the right card, and nothing is guessed."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.errors import DataError
from pretrain.planner.devices import TABLE, find_device, load_devices


@pytest.mark.parametrize(
    ("torch_name", "name", "bf16", "fp8"),
    [
        ("Tesla V100-SXM2-16GB", "V100 SXM2", None, None),
        ("Tesla V100-PCIE-32GB", "V100 PCIe", None, None),
        ("NVIDIA A100-SXM4-40GB", "A100 SXM 40 GB", 312.0, None),
        ("A100-SXM4-80GB", "A100 SXM 80 GB", 312.0, None),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40 GB", 312.0, None),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80 GB", 312.0, None),
        ("NVIDIA H100 80GB HBM3", "H100 SXM", 989.4, 1978.9),
        ("NVIDIA H100 PCIe", "H100 PCIe", 756.0, 1513.0),
        ("NVIDIA H200", "H200 SXM", 989.5, 1979.0),
        ("NVIDIA H200 NVL", "H200 NVL", 835.5, 1670.5),
        ("NVIDIA B200", "B200", 2250.0, 4500.0),
        ("NVIDIA L40S", "L40S", 362.05, 733.0),
    ],
)
def test_a_name_finds_its_card(torch_name: str, name: str, bf16: float | None, fp8: float | None) -> None:
    device = find_device(torch_name)
    assert device is not None
    assert device.name == name
    for arithmetic, teraflops in (("bf16", bf16), ("fp8", fp8)):
        assert device.peak(arithmetic) == (None if teraflops is None else pytest.approx(teraflops * 1e12))


@pytest.mark.parametrize(
    "torch_name", ["NVIDIA L40", "NVIDIA GeForce RTX 4090", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "NVIDIA B2000", ""]
)
def test_nothing_is_guessed(torch_name: str) -> None:
    assert find_device(torch_name) is None


def test_every_entry_is_plausible() -> None:
    for device in load_devices():
        assert len(device.source) > 10
        # Each narrower arithmetic is faster; a tensor core's is far above plain fp32's.
        known = [device.peaks[a] for a in ("fp32", "tf32", "fp16", "fp8") if a in device.peaks]
        assert known == sorted(known)
        assert device.peaks.get("bf16", device.peaks["fp16"]) == device.peaks["fp16"]
        assert 30e9 < device.memory_bytes < 1e12
        assert 5e11 < device.bytes_per_second < 2e13
    names = [pattern for device in load_devices() for pattern in device.patterns]
    assert len(names) == len(set(names))


ENTRY = TABLE.read_text().partition("[[device]]")[2].partition("[[device]]")[0]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("memory_gb = 32", "memory_gb = -1", "memory_gb: -1; give a number above 0"),
        ("memory_gb = 32", "memory = 32", "memory: unknown"),
        ("gb_per_second = 900\n", "", "gb_per_second: missing"),
        ("fp16 = 125.0", "fp16 = 'fast'", "fp16: 'fast'; give a number above 0"),
        ("fp16 = 125.0", "fp12 = 125.0", "give a table with some of fp32, tf32, bf16, fp16, fp8"),
        ("]\nmem", "\nmem", "cannot be read"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    table = tmp_path / "devices.toml"
    assert old in ENTRY
    table.write_text("[[device]]" + ENTRY.replace(old, new))
    with pytest.raises(DataError, match=message) as caught:
        load_devices(table)
    assert str(caught.value).startswith(str(table))
    assert "\n" not in str(caught.value).replace("\n", "", 0) or "cannot be read" in message
