"""Output beside the token files of a dataset: its parent folder, and the folder of its tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import TracebackType

from data_tools.output.protection import refuse_foreign
from pretrain.data.tokenizer.load import Tokenizer
from pretrain.errors import ConfigError, DataError


def prepare_output(prefix: str) -> None:
    """Creates the parent folder of `prefix`.

    Raises:
        ConfigError: the prefix is a folder.
        DataError: a file or folder is in the way that is not ours.
    """
    path = Path(prefix)
    refuse_foreign(prefix)
    if prefix.endswith("/") or path.is_dir() or not path.name:
        raise ConfigError(f"output prefix {prefix}: is a folder; give a name inside it, like {path / 'train'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path.parent}: cannot be created: {error.strerror}; choose another output prefix") from None


class TokenizerFolder:
    """PREFIX.tokenizer, written to a temporary folder at the start, since some tokenizers cannot be saved.

    Use it as a context manager; `publish` renames the folder to its final name.
    """

    def __init__(self, tokenizer: Tokenizer, prefix: str) -> None:
        self._tokenizer = tokenizer
        self._final, self._new, self._old = (Path(f"{prefix}.tokenizer{suffix}") for suffix in ("", ".tmp", ".old"))

    def __enter__(self) -> TokenizerFolder:
        """Writes the folder. Raises DataError: it cannot be written, or only with different ids."""
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
        """Publishes the folder, replacing that of an older dataset. Raises OSError."""
        if self._final.exists():
            self._final.rename(self._old)
        self._new.rename(self._final)

    def _remove(self) -> None:
        for folder in (self._new, self._old):
            if folder.is_symlink():
                folder.unlink()
            else:
                shutil.rmtree(folder, ignore_errors=True)
