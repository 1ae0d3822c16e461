"""Reads texts from JSON lines: one object per line, the text under a key or a path of keys."""

from __future__ import annotations

import json
from typing import Any

import orjson

from data_tools.readers.chunks import Block, Reject, excerpt
from data_tools.readers.cutting import BOM, too_long
from data_tools.readers.faults import Faults, not_utf8
from data_tools.readers.options import ReadOptions

_MISSING = object()


def parse_json_lines(path: str, block: Block, options: ReadOptions, faults: Faults) -> list[str]:
    """The strings under `options.json_key`, in order; blank lines are skipped. Raises DataError as `Faults`."""
    lines = block.data.split(b"\n")
    slow = _Lines(path, block, lines, options, faults)
    loads, key, limit = orjson.loads, options.json_key, options.max_document_bytes
    is_short, is_path = len(block.data) <= limit, "." in key
    texts: list[str] = []
    for number, line in enumerate(lines):
        text: Any = None
        if is_short or len(line) <= limit:
            try:
                text = find_key(loads(line), key) if is_path else loads(line)[key]
            except (ValueError, KeyError, TypeError):
                text = None
        if type(text) is not str:
            text = slow.examine(number)
            if text is None:
                continue
        texts.append(text)
    return texts


def find_key(tree: Any, key: str) -> Any:
    """The value under the literal `key`, else under the path of keys `a.b.c`.

    Raises:
        KeyError, TypeError: there is no such value.
    """
    if key in tree:
        return tree[key]
    for part in key.split("."):
        tree = tree[part]
    return tree


class _Lines:
    """Re-examines lines that gave no text, keeping track of their positions in the file."""

    def __init__(self, path: str, block: Block, lines: list[bytes], options: ReadOptions, faults: Faults) -> None:
        self._path, self._block, self._lines, self._options, self._faults = path, block, lines, options, faults
        self._number = self._offset = 0

    def examine(self, number: int) -> str | None:
        """The text of line `number`, from 0, if it can be repaired; None if it is blank or left out."""
        if not self._lines[number].strip():
            return None
        self._offset += sum(len(line) + 1 for line in self._lines[self._number : number])
        self._number = number
        result = self._text_or_fault(self._lines[number])
        if isinstance(result, str):
            return result
        self._faults.add(result)
        return None

    def _text_or_fault(self, line: bytes) -> str | Reject:
        limit = self._options.max_document_bytes
        if len(line) > limit:
            return too_long(self._path, *self._place(), "line", limit, line)
        try:
            return self._text(orjson.loads(line))
        except orjson.JSONDecodeError as error:
            broken = error
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as wrong:
            if not self._faults.replaces:
                return not_utf8(self._path, wrong, *self._place())
            return self._repaired(line.decode("utf-8", "replace").encode(), is_replaced=True)
        if self._faults.replaces and "surrogate" in str(broken):
            return self._repaired(line, is_replaced=False)
        return self._broken_json(broken)

    def _place(self) -> tuple[int, int]:
        return self._block.first_line + self._number, self._block.first_byte + self._offset

    def _fault(self, reason: str, message: str) -> Reject:
        return Reject(self._path, *self._place(), reason, excerpt(self._lines[self._number]), message)

    def _broken_json(self, error: ValueError) -> Reject:
        is_first = self._place()[1] <= len(BOM)
        if is_first and self._lines[self._number].strip() in (b"[", b"{"):
            hint = "one object per line is expected, which `jq -c` makes of a JSON document"
        else:
            hint = "mend or remove the line"
        return self._fault("broken_json", f"broken JSON ({error}); {hint}")

    def _repaired(self, line: bytes, *, is_replaced: bool) -> str | Reject:
        """The text of a line with U+FFFD for invalid UTF-8 and for lone surrogates."""
        try:
            tree = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            if "surrogate" not in str(error):
                return self._broken_json(error)
            try:
                tree = json.loads(line)
            except ValueError as broken:
                return self._broken_json(broken)
        text = self._text(tree)
        if isinstance(text, Reject):
            return text
        repaired = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        self._faults.replaced += is_replaced or repaired != text
        return repaired

    def _text(self, tree: Any) -> str | Reject:
        key = self._options.json_key
        if not isinstance(tree, dict):
            message = f'expected a JSON object like {{"{key}": "..."}}, found {type(tree).__name__}'
            return self._fault("not_an_object", message)
        try:
            value = find_key(tree, key)
        except (KeyError, TypeError):
            keys = ", ".join(list(tree)[:10]) or "none"
            return self._fault("no_key", f"no key {key!r}; the keys are: {keys}; choose one with --json-key")
        if isinstance(value, str):
            return value
        return self._fault("not_a_string", f"key {key!r}: {expected_string(value)}; mend or remove the line")


def expected_string(value: Any) -> str:
    """The message for a value that should be a string."""
    return f"expected a string, found {'null' if value is None else type(value).__name__}"
