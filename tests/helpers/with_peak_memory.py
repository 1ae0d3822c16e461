"""Runs a command and writes the largest memory of one of its processes, in bytes: with_peak_memory.py FILE COMMAND.

Asked directly, the system answers with the caller's own largest memory where that is more: a child inherits the figure
until it has replaced the caller's program. This process is small.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path


def main(file: str, command: list[str]) -> None:
    process = subprocess.Popen(command)
    # What ends this process must not leave the command behind.
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    code = process.wait()
    Path(file).write_text(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
