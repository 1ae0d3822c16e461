"""The options of preprocessing in a manifest, and the command that would make the dataset again.

Only options that determine a dataset's content are recorded. Merging compares the options of its inputs and records
those of the single run that would have made the whole dataset.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

from data_tools.encoding.cleaning import CleaningOptions
from data_tools.encoding.encode import EncodeOptions
from data_tools.readers import ReadOptions
from pretrain.data.dataset.manifest import OptionValue, Preprocessing

PROGRAM = ("taco", "data", "preprocess")
WHOLE_RANGE = "0:1"
# Options of reading that change no token and reject no document.
_SILENT = ("chunk_bytes",)
_FLAGS = {"has_header": "--no-header"}


def record_options(inputs: Sequence[str], options: EncodeOptions, *, dedup: bool) -> Preprocessing:
    """The record in the manifest of a dataset made from these inputs and options."""
    return Preprocessing(
        inputs=tuple(inputs),
        tokenizer=options.tokenizer,
        cased=options.cased,
        hash_range=":".join(map(str, options.hash_range)),
        dedup=dedup,
        reading={name: value for name, value in asdict(options.reading).items() if name not in _SILENT},
        cleaning=asdict(options.cleaning),
    )


def content_flags(record: Preprocessing) -> tuple[tuple[str, ...], ...]:
    """The flags, with values, of all options that differ from the defaults; without the tokenizer and `--dedup`.

    An option unknown to this release counts as different, one missing from the record as default.
    """
    flags = [*_flags(record.reading, asdict(ReadOptions())), *_flags(record.cleaning, asdict(CleaningOptions()))]
    flags += [("--cased",)] if record.cased else []
    flags += [("--hash-range", record.hash_range)] if record.hash_range != WHOLE_RANGE else []
    return tuple(flags)


def command_words(record: Preprocessing, prefix: str) -> list[str]:
    """The command, as a list of words, that makes the dataset `prefix` with the recorded options."""
    words = [*PROGRAM, "--input", *record.inputs, "--tokenizer", record.tokenizer, "--output-prefix", prefix]
    words += [word for flag in content_flags(record) for word in flag]
    return words + (["--dedup"] if record.dedup else [])


def _flags(values: Mapping[str, OptionValue], defaults: Mapping[str, OptionValue]) -> Iterator[tuple[str, ...]]:
    for name, value in values.items():
        if name in defaults and value == defaults[name]:
            continue
        flag = _FLAGS.get(name, "--" + name.replace("_", "-"))
        yield (flag,) if isinstance(value, bool) else (flag, str(value))
