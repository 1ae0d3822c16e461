"""The command line that a manifest records: what makes the dataset again, so nothing that leaves its content alone.

Merging compares the commands of its inputs and records the one that would have made the whole at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from data_tools.encoding.cleaning import CleaningOptions
from data_tools.encoding.encode import EncodeOptions
from data_tools.readers import ReadOptions

PROGRAM = ("taco", "data", "preprocess")
# Options of reading that change no token and reject no document.
_SILENT = ("chunk_bytes",)
_FLAGS = {"has_header": "--no-header"}
_SWITCHES = ("--cased", "--dedup", "--fold-whitespace", "--no-header", "--split-sentences")


@dataclass(frozen=True)
class RecordedCommand:
    """A command in parts; `options` are flags with their values, in the order of the program."""

    inputs: tuple[str, ...]
    prefix: str
    options: tuple[tuple[str, ...], ...]

    def words(self) -> list[str]:
        """The command as a list of words."""
        words = [*PROGRAM, "--input", *self.inputs]
        tokenizer = [word for option in self.options if option[0] == "--tokenizer" for word in option]
        others = [word for option in self.options if option[0] != "--tokenizer" for word in option]
        return [*words, *tokenizer, "--output-prefix", self.prefix, *others]

    @property
    def is_deduplicated(self) -> bool:
        """Whether it leaves out duplicates."""
        return ("--dedup",) in self.options


def record_command(inputs: Sequence[str], options: EncodeOptions, prefix: str, *, dedup: bool) -> RecordedCommand:
    """The command for these inputs and options."""
    found: list[tuple[str, ...]] = [("--tokenizer", options.tokenizer)]
    found += _flags(options.reading) + _flags(options.cleaning)
    found += [("--cased",)] if options.cased else []
    if options.hash_range != (0, 1):
        found.append(("--hash-range", ":".join(map(str, options.hash_range))))
    found += [("--dedup",)] if dedup else []
    return RecordedCommand(tuple(inputs), prefix, tuple(found))


def parse_command(words: Sequence[str]) -> RecordedCommand | None:
    """The parts of a recorded command; None for one of another program."""
    if tuple(words[:3]) != PROGRAM:
        return None
    inputs: list[str] = []
    options: list[tuple[str, ...]] = []
    prefix, position = "", 3
    while position < len(words):
        flag = words[position]
        if flag == "--input":
            # Inputs end at the flag that always follows them.
            end = list(words).index("--tokenizer", position)
            inputs, position = list(words[position + 1 : end]), end
        elif flag in _SWITCHES:
            options.append((flag,))
            position += 1
        else:
            value = words[position + 1] if position + 1 < len(words) else ""
            if flag == "--output-prefix":
                prefix = value
            else:
                options.append((flag, value))
            position += 2
    return RecordedCommand(tuple(inputs), prefix, tuple(options))


def _flags(options: ReadOptions | CleaningOptions) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for field in fields(options):
        value = getattr(options, field.name)
        if value == field.default or field.name in _SILENT:
            continue
        flag = _FLAGS.get(field.name, "--" + field.name.replace("_", "-"))
        found.append((flag,) if flag in _SWITCHES else (flag, str(value)))
    return found
