"""Reads manifests of release 0.1.0, which recorded the options of preprocessing only as a command, from its words.

No other module parses a recorded command. Newer manifests hold the options as data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter

from data_tools.encoding.cleaning import CleaningOptions
from data_tools.encoding.encode import EncodeOptions, parse_hash_range
from data_tools.output.recorded_options import PROGRAM, WHOLE_RANGE, record_options
from data_tools.readers import ReadOptions
from pretrain.data.dataset.manifest import REMEDY, Preprocessing
from pretrain.errors import DataError

_SWITCHES = ("--cased", "--dedup", "--fold-whitespace", "--no-header", "--split-sentences")
_Options = TypeVar("_Options", ReadOptions, CleaningOptions)


def options_of_command(path: Path, words: Sequence[str]) -> Preprocessing | None:
    """The options in the command that the manifest `path` records; None for a command of another program.

    Raises:
        DataError: it is not a command of release 0.1.0.
    """
    if tuple(words[:3]) != PROGRAM:
        return None
    try:
        # --tokenizer always follows the inputs.
        end = list(words).index("--tokenizer")
        values = _values(words[end:])
        del values["output_prefix"]
        dedup = bool(values.pop("dedup", ""))
        options = EncodeOptions(
            tokenizer=values.pop("tokenizer"),
            cased=bool(values.pop("cased", "")),
            hash_range=parse_hash_range(values.pop("hash_range", WHOLE_RANGE)),
            reading=_take(ReadOptions, values),
            cleaning=_take(CleaningOptions, values),
        )
        if values:
            raise ValueError(f"there is no option {', '.join(values)}")
    except (ValueError, IndexError, KeyError) as error:
        raise DataError(f"{path}: command: cannot be understood ({error}); {REMEDY}") from None
    return record_options(words[4:end], options, dedup=dedup)


def _values(words: Sequence[str]) -> dict[str, str]:
    """The values of flags and switches by option name."""
    values: dict[str, str] = {}
    position = 0
    while position < len(words):
        flag = words[position]
        is_switch = flag in _SWITCHES
        values[flag.removeprefix("--").replace("-", "_")] = "true" if is_switch else words[position + 1]
        position += 1 if is_switch else 2
    if values.pop("no_header", None):
        values["has_header"] = "false"
    return values


def _take(kind: type[_Options], values: dict[str, str]) -> _Options:
    """The options of one group, with typed values; removes them from `values`."""
    own = {field.name: values.pop(field.name) for field in fields(kind) if field.name in values}
    return TypeAdapter(kind).validate_strings(own)
