"""The text column of parquet and arrow tables: finding it, and turning its values into texts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from data_tools.readers.chunks import Reject, excerpt
from data_tools.readers.compression import DamagedError
from data_tools.readers.cutting import too_long
from data_tools.readers.faults import Faults
from data_tools.readers.headers import no_column, several_columns
from data_tools.readers.json_lines import expected_string
from pretrain.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa


def find_column(path: str, schema: pa.Schema, key: str) -> list[str]:
    """The path of names to the column `key`: itself, or fields of structs as in `a.b`.

    Raises:
        DataError: the column is missing or does not hold strings.
    """
    import pyarrow as pa

    names = [key] if key in schema.names else key.split(".")
    if names[0] not in schema.names:
        raise no_column(path, key, schema.names)
    if schema.names.count(names[0]) > 1:
        raise several_columns(path, names[0], schema.names)
    kind: Any = schema.field(names[0]).type
    for name in names[1:]:
        fields = [field.name for field in kind] if pa.types.is_struct(kind) else []
        if name not in fields:
            raise no_column(path, key, _paths(schema))
        if fields.count(name) > 1:
            raise several_columns(path, name, fields)
        kind = kind.field(name).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not any(check(value) for check in (*_text_checks(), pa.types.is_null)):
        hint = "choose one with --json-key"
        if pa.types.is_struct(kind):
            hint = (
                f"choose one of its fields with --json-key, such as {key}.{kind.field(0).name}" if len(kind) else hint
            )
        raise DataError(f"{path}: column {key!r}: expected strings, found {kind}; {hint}")
    return names


def _text_checks() -> tuple[Any, ...]:
    import pyarrow as pa

    types = pa.types
    return (
        *(types.is_string, types.is_large_string, types.is_string_view),
        *(types.is_binary, types.is_large_binary, types.is_binary_view),
    )


def _paths(schema: pa.Schema) -> list[str]:
    return [path for field in schema for path in (_field_paths(field.name, field.type) or [field.name])]


def _field_paths(name: str, kind: Any) -> list[str]:
    import pyarrow as pa

    if not pa.types.is_struct(kind):
        return [name]
    return [path for field in kind for path in _field_paths(f"{name}.{field.name}", field.type)]


def text_column(batch: pa.RecordBatch, names: list[str]) -> pa.Array:
    """The column at the path `names`, as bytes, with validated offsets: a malicious file may hold any.

    Raises:
        pa.ArrowInvalid: an offset is outside the data.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    column = batch.column(batch.schema.get_field_index(names[0]))
    if len(names) > 1:
        column = pc.struct_field(column, names[1:])
    if not pa.types.is_dictionary(column.type):
        return _as_bytes(column)
    column.indices.validate(full=True)
    return pa.DictionaryArray.from_arrays(column.indices, _as_bytes(column.dictionary)).dictionary_decode()


def _as_bytes(column: pa.Array) -> pa.Array:
    """The column as bytes: whether a string is UTF-8 is the matter of its row, not damage of the file."""
    import pyarrow as pa

    raw = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
    column = column.view(raw.get(column.type, column.type))
    column.validate(full=True)
    return column.cast(pa.large_binary()) if pa.types.is_binary_view(column.type) else column  # cannot be taken from


def texts_of_column(path: str, column: pa.Array, first_row: int, limit: int, faults: Faults) -> list[str]:
    """The strings of a column; `first_row` is the number of its first row in the file, from 0."""
    values = column.to_pylist()
    try:
        if all(type(value) is bytes and len(value) <= limit for value in values):
            return [value.decode("utf-8") for value in values]
    except UnicodeDecodeError:
        pass
    return texts_of_values(path, values, first_row, limit, faults)


def texts_of_values(path: str, values: Iterable[Any], first_row: int, limit: int, faults: Faults) -> list[str]:
    """The strings among `values`; every other value is a fault with its row number, from 1."""
    texts = []
    for row, value in enumerate(values, start=first_row + 1):
        text = value
        if isinstance(value, bytes):
            text = faults.decode(value, partial(_not_utf8, path, value, row))
            if text is None:
                continue
        if not isinstance(text, str):
            message = f"{expected_string(value)}; mend or remove the row"
            faults.add(Reject(path, row, None, "not_a_string", excerpt(repr(value)), message, is_row=True))
        elif len(text) > limit or (4 * len(text) > limit and len(text.encode()) > limit):
            fault = too_long(path, row, 0, "text", limit, text.encode()[:400])
            faults.add(Reject(path, row, None, fault.reason, fault.excerpt, fault.message, is_row=True))
        else:
            texts.append(text)
    return texts


def _not_utf8(path: str, value: bytes, row: int, error: UnicodeDecodeError) -> Reject:
    message = f"byte {error.start} of the text (0x{value[error.start]:02x}) is not UTF-8: {error.reason}; mend the row"
    return Reject(path, row, None, "not_utf8", excerpt(value), message, is_row=True)


def value_bytes(column: pa.Array) -> int:
    """Total bytes of the values of a binary column."""
    import pyarrow.compute as pc

    return pc.sum(pc.binary_length(column)).as_py() or 0 if column.null_count < len(column) else 0


def damaged_rows(path: str, error: DataError, first_row: int, end_row: int) -> Reject:
    """The fault of rows (numbered from 0) that are lost because the file is damaged."""
    words = str(error).removeprefix(f"{path}: ")
    message = f"rows {first_row + 1} to {end_row} are lost: {words}"
    return Reject(path, first_row + 1, None, "damaged_file", "", message, is_row=True)


@contextmanager
def arrow_errors_named(path: str) -> Iterator[None]:
    """Turns pyarrow's errors into errors that name the file: DamagedError, or DataError if it cannot be read."""
    import pyarrow as pa

    try:
        yield
    except DataError:
        raise
    except (pa.ArrowException, EOFError, OSError, ValueError, LookupError, OverflowError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{path}: cannot be read: {os.strerror(error.errno)}") from None
        words = " ".join(str(error).split())
        if "decrypt" in words.lower() or "encrypt" in words.lower():
            raise DataError(
                f"{path}: is encrypted ({words}); decrypt it with its keys, and give the plain file"
            ) from None
        if isinstance(error, pa.ArrowNotImplementedError):
            raise DataError(
                f"{path}: is of a sort that pyarrow {pa.__version__} cannot read ({words}); write it again "
                "with other types or another compression"
            ) from None
        if isinstance(error, MemoryError):  # damaged sizes end like this, too, so it counts as damage
            words = f"needs more memory than there is ({words}); give more, or smaller row groups; or it is damaged"
            raise DamagedError(f"{path}: {words}", None) from None
        raise DamagedError(f"{path}: damaged or truncated file ({words}); fetch it again", None) from None
