"""The errors that people see: each names what is wrong, the values involved and the remedy.

A program turns them into one line on standard error and the exit code they carry. Impossible states in our own code
remain `AssertionError`; they are bugs and deserve a traceback.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

# Set by `taco train --processes`: the folder in which each rank leaves why it ended, so that one reason is shown.
LAUNCH_FOLDER = "TACO_LAUNCH_FOLDER"


class TacoError(Exception):
    """Base of every error that a user can cause and fix.

    `is_consequence`: it only says that another rank has ended; the reason is there.
    """

    exit_code = 1
    is_consequence = False


class ConfigError(TacoError, ValueError):
    """A configuration or a command line that cannot work."""

    exit_code = 2


class DataError(TacoError, ValueError):
    """A corpus, dataset or tokenizer file that is missing, damaged or does not fit."""


class VocabularySizeError(DataError):
    """A vocabulary that a text cannot give in the size asked for: `what` is the cause, `suggested` another size."""

    def __init__(self, what: str, asked: int, suggested: int) -> None:
        direction = "fewer, or give more text" if suggested < asked else "more"
        super().__init__(f"{what}; ask for --vocab-size {suggested} or {direction}")
        self.what, self.asked, self.suggested = what, asked, suggested

    def __reduce__(self) -> tuple[type[VocabularySizeError], tuple[str, int, int]]:
        return type(self), (self.what, self.asked, self.suggested)


class CheckpointError(TacoError):
    """A checkpoint that is missing, damaged or belongs to something else."""


class MissingExtensionError(TacoError, ImportError):
    """The C++ extension has not been built for this interpreter."""


_MOST_LINES, _LONGEST_LINE = 40, 2000
_MOST_CHARACTERS = 6000


def cut_to_screen(message: str) -> str:
    """A message that fits a screen: what is left out is counted, beginning and end, which names the remedy, stay."""
    lines = [_cut_middle(line, _LONGEST_LINE) for line in message.split("\n")]
    if len(lines) > _MOST_LINES:
        lines = [*lines[: _MOST_LINES - 2], f"... {len(lines) - _MOST_LINES + 1:,} more lines ...", lines[-1]]
    return _cut_middle("\n".join(lines), _MOST_CHARACTERS)


def _cut_middle(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    first, last = most * 2 // 3, most // 3 - 50
    return f"{text[:first]} ... {len(text) - first - last:,} characters ... {text[-last:]}"


def counted(number: int, noun: str, nouns: str = "") -> str:
    """`1 document`, `1,234 documents`; `nouns` if the plural is not made with an s."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"


def leave_reason(text: str, *, is_consequence: bool = False) -> bool:
    """Tell the launcher why this rank ends; False if no launcher asks, or it cannot be told: say it yourself."""
    folder = os.environ.get(LAUNCH_FOLDER)
    if not folder:
        return False
    path = reason_file(Path(folder), int(os.environ.get("RANK", "0")))
    record = {"text": text, "is_consequence": is_consequence}
    with contextlib.suppress(OSError):
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(record), encoding="utf-8")
        unfinished.rename(path)
        return True
    return False


def reason_file(folder: Path, rank: int) -> Path:
    """The file in the launcher's folder in which a rank leaves why it ended: JSON, `text`, `is_consequence`, `time`."""
    return folder / f"rank_{rank:05d}.json"
