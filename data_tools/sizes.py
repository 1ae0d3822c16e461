"""Values of command lines: sizes in bytes, shards, and the least that a vocabulary has."""

from __future__ import annotations

import re

from pretrain.errors import ConfigError

# The special tokens and a few pieces beside them.
SMALLEST_VOCABULARY = 8
_SIZE = re.compile(r"(\d+)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_SHIFTS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def parse_size(flag: str, text: str) -> int:
    """The bytes of `512M`, `2G` or `1000000`. Raises ConfigError: not a size."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{flag} {text}: expected a number of bytes, such as 1000000, 512M or 2G")
    return int(match[1]) << _SHIFTS[match[2].upper()]


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) of `i/n`. Raises ConfigError: not two numbers with 0 <= i < n."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise ConfigError(f"--shard {text}: expected I/N with 0 <= I < N, such as 0/16 to 15/16")
    return int(match[1]), int(match[2])
