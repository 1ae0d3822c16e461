"""How ranks of this machine have ended, why, and what that means for the whole: one reason and one exit code."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pretrain.errors import ConfigError, reason_file
from pretrain.resilience.stop_request import EXIT_PREEMPTED, NOTHING_TO_SAVE
from pretrain.resilience.watchdog import EXIT_HANG

# After a first rank has ended badly: those that save, write stacks, or only miss another one may end on their own.
_PATIENCE = 30.0
# Otherwise they cannot go on; this long may another one take to leave the same reason.
_SHORT_PATIENCE = 1.0


@dataclass(frozen=True)
class Reason:
    """What a rank left when it ended; `is_consequence`: another rank's end was the cause."""

    text: str
    is_consequence: bool


class RankEnds:
    """Looks at running ranks without taking their exit codes from whoever waits for them.

    Attributes:
        codes: of the ranks that have ended, in the order in which this was seen; negative: the signal that ended it.
        killed: ranks that were ended here because another one had ended.
    """

    def __init__(self, folder: Path) -> None:
        self.codes: dict[int, int] = {}
        self.killed: set[int] = set()
        self._folder = folder
        self._since: float | None = None

    def have_all_ended(self, processes: Mapping[int, int]) -> bool:
        """Whether these (process by rank) have ended; once one has failed, the others are given little time.

        Those that do not end on their own are killed: without the one that is missing nothing can be saved any more.
        """
        self._note(processes)
        if not any(self.codes.values()):
            return len(self.codes) == len(processes)
        if self._since is None:
            self._since = time.monotonic()
        if time.monotonic() - self._since > self._patience():
            for rank, process in processes.items():
                if rank not in self.codes:
                    self.killed.add(rank)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
        return len(self.codes) == len(processes)

    def running(self, processes: Mapping[int, int]) -> list[int]:
        """The processes of these that still run."""
        self._note(processes)
        return [process for rank, process in processes.items() if rank not in self.codes]

    def _note(self, processes: Mapping[int, int]) -> None:
        for rank, process in processes.items():
            if rank not in self.codes and (code := _exit_code(process)) is not None:
                self.codes[rank] = code

    def _patience(self) -> float:
        failed = [rank for rank, code in self.codes.items() if code]
        if any(self.codes[rank] in (EXIT_PREEMPTED, EXIT_HANG) for rank in failed):
            return _PATIENCE
        reasons = [self.reason(rank) for rank in failed]
        if all(reason is not None and reason.is_consequence for reason in reasons):
            return _PATIENCE
        return _SHORT_PATIENCE

    def reason(self, rank: int) -> Reason | None:
        """What this rank left; None if it could not."""
        try:
            record = json.loads(reason_file(self._folder, rank).read_text(encoding="utf-8"))
            return Reason(str(record["text"]), bool(record["is_consequence"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def verdict(self, processes: Mapping[int, int], handed_on: set[int]) -> tuple[int, str | None]:
        """The exit code of the whole, and the one reason that people read; None where they have read it already.

        Args:
            handed_on: the signals that the launcher has passed to the ranks; one that ended of it had not begun.
        """
        failed = [rank for rank, code in self.codes.items() if code and rank not in self.killed]
        if not failed:
            return 0, None
        rank = min(failed, key=self._order)
        code, reason = self.codes[rank], self.reason(rank)
        if code == EXIT_PREEMPTED:
            return code, None if reason is None else reason.text
        if -code in handed_on:
            return EXIT_PREEMPTED, NOTHING_TO_SAVE
        who = "" if rank == 0 or code == ConfigError.exit_code else f"[rank {rank}] "
        if reason is not None:
            return code if code > 0 else 128 - code, who + reason.text
        if code < 0:
            name = signal.Signals(-code).name
            hint = ", by the system if memory ran out" if -code == signal.SIGKILL else ""
            return 128 - code, (
                f"error: rank {rank} (process {processes[rank]}) was ended by {name}{hint}; the same command continues "
                "from the last checkpoint"
            )
        if code > 128:  # a second signal, which the launcher or the rank has announced
            return code, None
        return code, f"error: rank {rank} (process {processes[rank]}) ended with exit code {code}"

    def _order(self, rank: int) -> tuple[bool, bool, int]:
        """Hangs first, then causes before consequences, then as seen."""
        code, reason = self.codes[rank], self.reason(rank)
        is_consequence = reason is not None and reason.is_consequence
        return code != EXIT_HANG, is_consequence, list(self.codes).index(rank)


def _exit_code(process: int) -> int | None:
    """The exit code of a child, negative for a signal, without reaping it; None while it runs."""
    try:
        state = os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # reaped in this moment by torch's agent, which stops looking then
        return None
    if state is None:
        return None
    return state.si_status if state.si_code == os.CLD_EXITED else -state.si_status
