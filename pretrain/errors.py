"""The errors that people see: each names what is wrong, the values involved and the remedy.

A program turns them into one line on standard error and the exit code they carry. Impossible states in our own code
remain `AssertionError`; they are bugs and deserve a traceback.
"""

from __future__ import annotations


class TacoError(Exception):
    """Base of every error that a user can cause and fix."""

    exit_code = 1


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
