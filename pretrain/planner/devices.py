"""What known GPUs can do at best, from the table `devices.toml`; imports no torch.

A part of a card (MIG) and a card that is not in the table have no peak: nothing is guessed from similar names.
"""

from __future__ import annotations

import functools
import re
import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

from pretrain.errors import DataError

Arithmetic = Literal["fp32", "tf32", "bf16", "fp16", "fp8"]

TABLE = Path(__file__).with_name("devices.toml")

_KEYS = frozenset({"name", "names", "memory_gb", "gb_per_second", "tflops", "source"})


@dataclass(frozen=True)
class Device:
    """One kind of GPU.

    Attributes:
        name: for people.
        patterns: of the names by which torch knows it; lower case, without the maker.
        memory_bytes, bytes_per_second: of its memory.
        peaks: dense operations per second by arithmetic; one that it does not have is absent.
        source: where the numbers stand.
    """

    name: str
    patterns: tuple[str, ...]
    memory_bytes: float
    bytes_per_second: float
    peaks: dict[Arithmetic, float]
    source: str

    def peak(self, arithmetic: Arithmetic) -> float | None:
        """Dense operations per second; None for an arithmetic that its tensor cores do not have."""
        return self.peaks.get(arithmetic)


def find_device(torch_name: str) -> Device | None:
    """The kind of GPU that `torch.cuda.get_device_name()` names; None if the table does not know it."""
    name = re.sub(r"^(NVIDIA|Tesla)\s+", "", torch_name.strip(), flags=re.IGNORECASE)
    name = re.sub(r"^Tesla\s+", "", name, flags=re.IGNORECASE).lower()
    if re.search(r"\bmig\b", name):
        return None
    return next((device for device in load_devices() if _is_named(device, name)), None)


def _is_named(device: Device, name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in device.patterns)


@functools.cache
def load_devices(table: Path = TABLE) -> tuple[Device, ...]:
    """All devices of a table.

    Raises:
        DataError: it cannot be read, or an entry is not one; names the entry.
    """
    try:
        tree = tomllib.loads(table.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"{table}: cannot be read: {error}; restore the file") from None
    entries = tree.get("device")
    if not isinstance(entries, list) or set(tree) != {"device"}:
        raise DataError(f"{table}: holds [[device]] entries and nothing else; see its first lines")
    return tuple(_parse(table, number, entry) for number, entry in enumerate(entries, start=1))


def _parse(table: Path, number: int, entry: dict[str, Any]) -> Device:
    where = f"{table}: device {number} ({entry.get('name', 'without a name')})"
    if wrong := sorted(set(entry) ^ _KEYS):
        raise DataError(
            f"{where}: {wrong[0]}: {'unknown' if wrong[0] in entry else 'missing'}; the keys are {_shown()}"
        )
    for key in ("name", "source"):
        _check(where, key, entry[key], isinstance(entry[key], str) and entry[key] != "", "some text")
    names, tflops = entry["names"], entry["tflops"]
    are_names = isinstance(names, list) and bool(names) and all(isinstance(name, str) for name in names)
    _check(where, "names", names, are_names, "a list of names")
    is_known = isinstance(tflops, dict) and bool(tflops) and set(tflops) <= set(get_args(Arithmetic))
    _check(where, "tflops", tflops, is_known, f"a table with some of {', '.join(get_args(Arithmetic))}")
    for key, value in (*((key, entry[key]) for key in ("memory_gb", "gb_per_second")), *tflops.items()):
        _check(where, key, value, type(value) in (int, float) and 0 < value < 1e9, "a number above 0")
    return Device(
        name=entry["name"],
        patterns=tuple(name.lower() for name in names),
        memory_bytes=1e9 * entry["memory_gb"],
        bytes_per_second=1e9 * entry["gb_per_second"],
        peaks={arithmetic: 1e12 * value for arithmetic, value in tflops.items()},
        source=entry["source"],
    )


def _check(where: str, key: str, value: object, is_right: bool, wanted: str) -> None:  # noqa: FBT001
    if not is_right:
        raise DataError(f"{where}: {key}: {value!r}; give {wanted}")


def _shown() -> str:
    return ", ".join(sorted(_KEYS))
