"""The digest of the C++ extension's sources: compiled in by setup.py, compared with csrc/ when the extension is loaded.

So an extension older than the sources beside it, as after an update without a rebuild, is reported instead of used.
Only the standard library is used here because setup.py imports this module before anything is installed.
"""

from __future__ import annotations

import zlib
from pathlib import Path


def sources_digest(csrc: Path) -> str:
    """Eight hexadecimal digits over the names and contents of the extension's sources; empty if there are none."""
    paths = sorted(p for p in csrc.rglob("*.[ch]pp") if "tests" not in p.relative_to(csrc).parts)
    digest = 0
    for path in paths:
        digest = zlib.crc32(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes(), digest)
    return f"{digest:08x}" if paths else ""
