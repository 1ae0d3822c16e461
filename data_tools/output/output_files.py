"""What stands beside the token files of a dataset: its folder, and the tokenizer that made it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import TracebackType

from pretrain.data.tokenizer.folder import MARKER
from pretrain.data.tokenizer.load import Tokenizer
from pretrain.errors import ConfigError, DataError


def prepare_output(prefix: str) -> None:
    """Makes the folder of `prefix`.

    Raises:
        ConfigError: the prefix names a folder.
        DataError: something is in the way.
    """
    path, tokenizer = Path(prefix), Path(f"{prefix}.tokenizer")
    if tokenizer.exists() and not (tokenizer / MARKER).exists():
        raise DataError(f"{tokenizer}: is in the way and not of our making; choose another output prefix")
    if prefix.endswith("/") or path.is_dir() or not path.name:
        raise ConfigError(f"output prefix {prefix}: is a folder; give a name inside it, like {path / 'train'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path.parent}: cannot be created: {error.strerror}; choose another output prefix") from None


class TokenizerFolder:
    """PREFIX.tokenizer, written under a temporary name at once, since some tokenizers cannot be saved.

    Use it as a context manager; `publish` puts the folder in its place.
    """

    def __init__(self, tokenizer: Tokenizer, prefix: str) -> None:
        self._tokenizer = tokenizer
        self._final, self._new, self._old = (Path(f"{prefix}.tokenizer{suffix}") for suffix in ("", ".tmp", ".old"))

    def __enter__(self) -> TokenizerFolder:
        """Writes the folder. Raises DataError: it cannot be written, or not with the same ids."""
        self._remove()
        try:
            self._tokenizer.save_pretrained(self._new)
        except DataError:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def publish(self) -> None:
        """Replaces the folder of an older dataset. Raises OSError."""
        if self._final.exists():
            self._final.rename(self._old)
        self._new.rename(self._final)

    def _remove(self) -> None:
        for folder in (self._new, self._old):
            shutil.rmtree(folder, ignore_errors=True)
