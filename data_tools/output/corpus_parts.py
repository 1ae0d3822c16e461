"""Which datasets are the parts of one corpus: told by the files that each of them was made from.

A part records all inputs of its run, also those of which it read nothing. Parts belong together if names, sizes and
order agree, at whatever place the corpus lies; times of modification must agree too, unless the user vouches for it.
Parts of release 0.1.0 record no files, and are compared by the inputs on their command lines.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import PurePath
from typing import Protocol, TypeVar

from pretrain.data.dataset.manifest import InputRecord, Manifest, Preprocessing
from pretrain.errors import DataError

_NAMED = 3
_UNITS_NS = (100, 1000, 10**6, 10**9)
# Options that decide where documents begin and end, and so which part holds them.
_CUTTING = ("input_format", "text_documents", "delimiter", "quoting", "has_header", "max_document_bytes")


class Part(Protocol):
    """A dataset with its manifest; `options` is None if no single run of preprocessing would make it."""

    @property
    def prefix(self) -> str: ...
    @property
    def manifest(self) -> Manifest: ...
    @property
    def options(self) -> Preprocessing | None: ...


P = TypeVar("P", bound=Part)


def group_parts(datasets: Sequence[P], *, is_mixed: bool) -> list[list[P]]:
    """The datasets in groups, in order of first mention: the parts of a corpus in their order, others alone.

    Raises:
        DataError: a part is missing, given twice, of another division, or of other inputs; `is_mixed` lets times of
            modification differ.
    """
    groups: list[list[P]] = []
    for item in datasets:
        group = next((group for group in groups if _are_together(_example(group), item, is_mixed)), None)
        if group is None:
            groups.append([item])
        else:
            group.append(item)
    corpora = [group for group in groups if group[0].manifest.shard]
    for group in corpora:
        _check_numbers(group)
    _check_complete(corpora, is_mixed)
    for group in corpora:
        for part in group:
            _check_alike(_example(group), part, is_mixed)
        group.sort(key=_number)
    return groups


def _example(parts: Sequence[P]) -> P:
    """The first part that records its inputs, or the first of all."""
    return next((part for part in parts if part.manifest.shard_inputs), parts[0])


def _are_together(first: Part, other: Part, is_mixed: bool) -> bool:
    if not first.manifest.shard or not other.manifest.shard:
        return False
    ours, theirs = first.manifest.shard_inputs, other.manifest.shard_inputs
    if not ours or not theirs:
        return _given(first) == _given(other) or (is_mixed and _given_names(first) == _given_names(other))
    return len(ours) == len(theirs) and all(
        one.num_bytes == two.num_bytes and _is_same_name(one, two) for one, two in zip(ours, theirs, strict=True)
    )


def _is_same_name(one: InputRecord, two: InputRecord) -> bool:
    """Whether both may be one file: the same name in its folder, or the one's name is the end of the other's path."""
    return one.name == two.name or _ends_with(one.path, two.name) or _ends_with(two.path, one.name)


def _ends_with(path: str, name: str) -> bool:
    parts, end = PurePath(path).parts, PurePath(name).parts
    return bool(end) and parts[-len(end) :] == end


def _check_numbers(parts: Sequence[Part]) -> None:
    names: dict[int, str] = {}
    for part in parts:
        number, count = part.manifest.shard or (0, 1)
        if count != _count(parts[0]):
            raise DataError(
                f"{part.prefix}: is part {part.manifest.shard} of another division than {parts[0].prefix} "
                f"({parts[0].manifest.shard}); preprocess all parts with the same N in --shard I/N"
            )
        if number in names:
            raise DataError(f"{part.prefix}: is part {number} of {count}, as {names[number]} is; name each part once")
        names[number] = part.prefix


def _check_complete(corpora: Sequence[Sequence[Part]], is_mixed: bool) -> None:
    """Raises DataError: a part is missing; if another corpus has one of that number, says how the inputs differ."""
    for group in corpora:
        missing = _missing(group)
        if not missing:
            continue
        for other in corpora:
            strangers = [part for part in other if _number(part) in missing and _count(part) == _count(group[0])]
            if other is not group and strangers and _missing(other):
                raise DataError(_other_inputs(_example(group), strangers[0], is_mixed))
        count, numbers = _count(group[0]), ", ".join(map(str, missing))
        raise DataError(
            f"part {numbers} of {count} is missing beside {group[0].prefix}; name it too, or preprocess it "
            f"with --shard {missing[0]}/{count}"
        )


def _missing(parts: Sequence[Part]) -> list[int]:
    return sorted(set(range(_count(parts[0]))) - set(map(_number, parts)))


def _other_inputs(first: Part, other: Part, is_mixed: bool) -> str:
    ours, theirs = first.manifest.shard_inputs, other.manifest.shard_inputs
    changes = f": {_changes(ours, theirs)}" if ours and theirs else ""
    start = _stranger(first, other, is_moved=not changes or _given(first) != _given(other))
    remedy = "preprocess all parts from the same inputs"
    if not changes and not is_mixed and _given_names(first) == _given_names(other):
        remedy = f"if these are the same files, --mixed joins the parts; else {remedy}"
    return f"{start}{changes}; {remedy}"


def _stranger(first: Part, other: Part, *, is_moved: bool) -> str:
    if not is_moved:
        return f"{other.prefix}: was made from other inputs than {first.prefix}"
    return (
        f"{other.prefix}: is part {_number(other)} of {_count(other)}, but of other inputs ({_first_inputs(other)}) "
        f"than {first.prefix} ({_first_inputs(first)})"
    )


def _changes(ours: Sequence[InputRecord], theirs: Sequence[InputRecord]) -> str:
    """How the second list of files differs from the first."""
    before, after = ({item.name: item for item in items} for items in (ours, theirs))
    changes = [f"{item.path} is new ({item.num_bytes} bytes)" for name, item in after.items() if name not in before]
    changes += [f"{item.path} is missing" for name, item in before.items() if name not in after]
    changes += [
        f"{after[name].path}: size {item.num_bytes}, now {after[name].num_bytes}"
        for name, item in before.items()
        if name in after and after[name].num_bytes != item.num_bytes
    ]
    if not changes:
        place = next((n for n, (one, two) in enumerate(zip(ours, theirs, strict=False)) if one.name != two.name), 0)
        changes = [f"their order: {ours[place].path}, now {theirs[place].path}"]
    return _first(changes)


def _check_alike(first: Part, other: Part, is_mixed: bool) -> None:
    """Notes that a part was read from another place; raises DataError: it was cut otherwise, or a file was changed."""
    _check_cutting(first, other)
    records = zip(first.manifest.shard_inputs or (), other.manifest.shard_inputs or (), strict=False)
    pairs = [(one, two) for one, two in records if one != two]
    moved = [(one, two) for one, two in pairs if one.path != two.path]
    changed = [(one, two) for one, two in pairs if not _is_same_time(one, two)]
    if changed and not is_mixed:
        one, two = changed[0]
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise DataError(
            f"{_stranger(first, other, is_moved=bool(moved))}: {two.path}: modified {_time(one)}, now {_time(two)}"
            f"{more}; names and sizes agree, so if only the times differ, as in a copy, --mixed joins the parts; else "
            "preprocess all of them again"
        )
    if moved:
        one, two = moved[0]
        sys.stderr.write(
            f"note: {other.prefix}: read its inputs at another place than {first.prefix} ({two.path}, not {one.path}); "
            f"they are the same files by name{'' if changed else ', time'} and size\n"
        )


def _is_same_time(one: InputRecord, two: InputRecord) -> bool:
    """Whether neither was modified; a copy may keep the time in coarser units, as archives do in seconds."""
    times = one.mtime_ns, two.mtime_ns
    units = _UNITS_NS if one.path != two.path else ()
    return times[0] == times[1] or any(
        times[0] // unit == times[1] // unit and 0 in (times[0] % unit, times[1] % unit) for unit in units
    )


def _check_cutting(first: Part, other: Part) -> None:
    if first.options is None or other.options is None:
        return
    for option in _CUTTING:
        expected, found = first.options.reading.get(option), other.options.reading.get(option)
        if expected != found:
            raise DataError(
                f"{other.prefix}: with {option} {found!r} the inputs are cut at other places than in {first.prefix}, "
                f"with {expected!r}; preprocess all parts with the same options"
            )


def _time(item: InputRecord) -> str:
    return datetime.fromtimestamp(item.mtime_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S.%f UTC")


def _first_inputs(part: Part) -> str:
    paths = [item.path for item in part.manifest.shard_inputs or ()] or list(_given(part))
    return ", ".join(paths[:_NAMED]) + (", ..." if len(paths) > _NAMED else "")


def _first(words: Sequence[str]) -> str:
    return ", ".join(words[:_NAMED]) + (f" and {len(words) - _NAMED} more" if len(words) > _NAMED else "")


def _given(part: Part) -> tuple[str, ...]:
    return part.options.inputs if part.options is not None else ()


def _given_names(part: Part) -> list[str]:
    return [PurePath(item).name for item in _given(part)]


def _number(part: Part) -> int:
    return part.manifest.shard[0] if part.manifest.shard else 0


def _count(part: Part) -> int:
    return part.manifest.shard[1] if part.manifest.shard else 1
