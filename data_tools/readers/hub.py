"""Streams texts from datasets of the Hugging Face hub: `hf://NAME[:CONFIGURATION][:SPLIT]`, split "train" by default.

The only module that imports `datasets`. Compute nodes often have no network, so errors include a workaround.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from data_tools.readers.chunks import Piece, Source, Values
from data_tools.readers.faults import Faults
from data_tools.readers.headers import no_column
from data_tools.readers.json_lines import find_key
from data_tools.readers.options import ReadOptions
from data_tools.readers.tables import texts_of_values
from pretrain.errors import DataError

PREFIX = "hf://"
_MAX_ROWS = 10_000


def split_name(path: str) -> tuple[str, str | None, str]:
    """Name, configuration and split of `hf://NAME[:CONFIGURATION][:SPLIT]`.

    Raises:
        DataError: a part is empty, or there are too many parts.
    """
    parts = path.removeprefix(PREFIX).split(":")
    if not all(parts) or len(parts) > 3:
        raise DataError(f"{path}: expected hf://NAME, hf://NAME:SPLIT or hf://NAME:CONFIGURATION:SPLIT")
    name, split = parts[0], parts[-1] if len(parts) > 1 else "train"
    return name, parts[1] if len(parts) == 3 else None, split


def cut_hub_rows(source: Source, options: ReadOptions, faults: Faults) -> Iterator[Piece]:
    """Chunks of values of the text column.

    Raises:
        DataError: the dataset cannot be reached, or the configuration, split or column does not exist.
    """
    values: list[Any] = []
    num_bytes = rows = 0
    for row in _rows(source.path):
        value = _value(source.path, row, options.json_key)
        values.append(value)
        num_bytes += len(value) if isinstance(value, str) else 0
        if num_bytes >= options.chunk_bytes or len(values) >= _MAX_ROWS:
            yield Piece(Values(tuple(values), rows), 0, 0)
            rows, values, num_bytes = rows + len(values), [], 0
    if values:
        yield Piece(Values(tuple(values), rows), 0, 0)
    elif not rows:
        raise DataError(f"{source.path}: holds no rows")


def parse_hub_rows(path: str, place: Values, options: ReadOptions, faults: Faults) -> tuple[list[str], int]:
    """The texts among values, and their bytes. Raises DataError as `Faults`."""
    texts = texts_of_values(path, place.values, place.file_row, options.max_document_bytes, faults)
    return texts, sum(len(text) if text.isascii() else len(text.encode()) for text in texts)


def load_stream(name: str, configuration: str | None, split: str) -> Iterable[dict[str, Any]]:
    """The rows of a dataset, streamed over the network. Raises whatever `datasets` raises."""
    import datasets

    stream: Iterable[dict[str, Any]] = datasets.load_dataset(name, configuration, split=split, streaming=True)
    return stream


def _rows(path: str) -> Iterator[dict[str, Any]]:
    try:
        yield from load_stream(*split_name(path))
    except (DataError, ModuleNotFoundError):  # a missing package is reported as everywhere else
        raise
    except Exception as error:  # noqa: BLE001 - the library, and those below it, raise errors of many kinds
        words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise DataError(
            f"{path}: cannot be read from the Hugging Face hub ({words}); check name, configuration and split, or, "
            "with network access, save it with datasets' save_to_disk() or as parquet, and give that folder"
        ) from None


def _value(path: str, row: dict[str, Any], key: str) -> Any:
    try:
        return find_key(row, key)
    except (KeyError, TypeError):
        if key.split(".")[0] in row:
            return None  # a part of the path is null in this row
        raise no_column(path, key, list(row)) from None
