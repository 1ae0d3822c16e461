"""One line for what is no bug and no mistake in a configuration: memory that is not there, files that refuse.

The last net under every program: what knows more of its file raises a TacoError that says more.
"""

from __future__ import annotations

import errno
import resource

_NO_MEMORY = (
    "failed to map segment",
    "annot allocate memory",
    "can't allocate memory",
    "std::bad_alloc",
    "can't start new thread",
)


def explain_machine_fault(error: Exception) -> str | None:
    """The line for an error of the machine; None for any other, which is a bug and deserves its traceback."""
    if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
        return f"out of memory ({_first_line(error)}); {_memory_limit()}"
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{_text(error.filename)}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.strerror}; free space"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _memory_limit() -> str:
    limit = min(
        (soft for soft, _ in map(resource.getrlimit, (resource.RLIMIT_AS, resource.RLIMIT_DATA)) if soft >= 0),
        default=None,
    )
    if limit is None:
        return "free memory on this machine, or give the job more"
    return f"this process may have {limit / 2**30:.2f} GiB (`ulimit -v`, `ulimit -d`); raise the limit"


def _text(name: str | bytes | int) -> str:
    return name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else str(name)
