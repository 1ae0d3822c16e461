"""Which rank hangs: what the signs of life of all ranks show when one of them has waited too long.

In a collective every rank waits for the one that does not join, so many look stuck; the culprit is the one behind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from pretrain.resilience.heartbeat import Sign

_SHOWN = 4


def describe_hang(before: Mapping[int, Sign], now: Mapping[int, Sign], world_size: int) -> str:
    """One line that names the ranks that hold up the others, and why.

    Args:
        before, now: signs by rank, read far enough apart that every running process has given another in between.
    """
    stopped = [rank for rank in range(world_size) if not _has_run(before.get(rank), now.get(rank))]
    running = [now[rank] for rank in range(world_size) if rank not in stopped]
    behind, why = (stopped, "") if stopped else _find_behind(running)
    others = [sign for sign in running if sign.rank not in behind]
    silent = max((sign.silent_seconds for sign in running), default=0.0)
    parts = [_describe_stopped(now.get(rank), rank, silent) for rank in stopped[:_SHOWN]]
    parts += [_describe_behind(now[rank], why) for rank in behind[:_SHOWN] if rank not in stopped]
    if len(behind) > _SHOWN:
        parts.append(f"and {len(behind) - _SHOWN} more ranks")
    if not behind:
        parts.append(f"no rank is behind, for {silent:.0f} s: look at the network between them, and at the stacks")
    parts += _describe_others(others)
    return f"hang in step {max((sign.step for sign in now.values()), default=0)}: " + "; ".join(parts)


def _has_run(before: Sign | None, now: Sign | None) -> bool:
    return now is not None and (before is None or now.count > before.count)


def _find_behind(signs: Sequence[Sign]) -> tuple[list[int], str]:
    """Ranks in an earlier stage, or else outside the collective in which others wait.

    Ticks keep growing when the step number goes back, as it does when a run returns to a checkpoint.
    """
    fewest = min(sign.ticks for sign in signs)
    last = [sign for sign in signs if sign.ticks == fewest]
    if len(last) < len(signs):
        return [sign.rank for sign in last], "is behind"
    waiting = [sign for sign in signs if sign.is_waiting]
    if len(signs) == 1:
        return [signs[0].rank], "makes no progress"
    if waiting:
        return [sign.rank for sign in signs if not sign.is_waiting], "does not join the others"
    return [], ""


def _describe_stopped(sign: Sign | None, rank: int, silent: float) -> str:
    reasons = "stopped, killed, or its node is away"
    if sign is None:
        return f"rank {rank} has given no sign of life in this start ({reasons})"
    return (
        f"rank {rank} on {sign.host} (process {sign.process}) does not run ({reasons}): silent for {silent:.0f} s, "
        f"last heard of in {sign.stage} of step {sign.step}"
    )


def _describe_behind(sign: Sign, why: str) -> str:
    place = f", at {sign.place}" if sign.place else ""
    return (
        f"rank {sign.rank} on {sign.host} (process {sign.process}) {why}: in {sign.stage} of step {sign.step} for "
        f"{sign.silent_seconds:.0f} s{place}"
    )


def _describe_others(signs: Iterable[Sign]) -> list[str]:
    places = Counter((sign.stage, sign.step) for sign in signs)
    return [
        f"{number} rank{'s wait' if number > 1 else ' waits'} in {stage} of step {step}"
        for (stage, step), number in places.most_common(_SHOWN)
    ]
