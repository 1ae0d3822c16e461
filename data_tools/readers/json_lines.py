"""Reads texts from JSON lines: one object per line, the text under a key or a path of keys."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import orjson

from data_tools.readers.chunks import Block, Reject, excerpt
from data_tools.readers.cutting import BOM, too_long
from data_tools.readers.faults import Faults, not_utf8
from data_tools.readers.options import ReadOptions

_MAX_DIGITS = 4000


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
            characters = line.removeprefix(BOM).decode("utf-8")
        except UnicodeDecodeError as wrong:
            if not self._faults.replaces:
                return not_utf8(self._path, wrong, *self._place())
            return self._python_text(line.decode("utf-8", "replace"), broken, is_replaced=True)
        return self._python_text(characters, broken, is_replaced=False)

    def _python_text(self, line: str, broken: ValueError, *, is_replaced: bool) -> str | Reject:
        """The text of a line that only Python's json reads: NaN, halves of surrogate pairs, numbers of any length.

        In the text itself, U+FFFD takes the place of such a half if faults are replaced.
        """
        try:
            tree = json.loads(line, parse_int=_integer)
        except RecursionError:
            return self._fault(
                "broken_json", "broken JSON (too many levels inside one another); mend or remove the line"
            )
        except ValueError:
            return self._broken_json(broken)
        text = self._text(tree)
        if isinstance(text, Reject):
            return replace(text, excerpt=excerpt(line))
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            if not self._faults.replaces:
                half = f"\\u{ord(text[error.start]):04x}"
                words = (
                    f"broken JSON (key {self._options.json_key!r}: {half} is half of a surrogate pair, no character)"
                )
                return self._fault("broken_json", f"{words}; mend or remove the line, or use --on-error replace")
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
            is_replaced = True
        self._faults.replaced += is_replaced
        return text

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
        hint = "mend or remove the line"
        if isinstance(value, dict) and value:
            hint = f"choose one of its keys with --json-key, such as {key}.{next(iter(value))}"
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            hint = f"make a line of each, for example with `jq -c '{_jq_path(tree, key)}[]'`"
        elif isinstance(value, list):
            hint = (
                f"join its parts, for example with `jq -c '{_jq_path(tree, key)} |= join(\"\\n\")'`, or remove the line"
            )
        return self._fault("not_a_string", f"key {key!r}: {expected_string(value)}; {hint}")


def _jq_path(tree: Any, key: str) -> str:
    """The value at `key`, as jq names it: a name that is no word stands in quotes."""
    parts = [key] if key in tree else key.split(".")
    words = (part if re.fullmatch(r"[A-Za-z_]\w*", part, re.ASCII) else json.dumps(part) for part in parts)
    return "".join(f".{word}" for word in words)


def _integer(digits: str) -> int | float:
    """Python refuses integers of thousands of digits; they are never a text."""
    return int(digits) if len(digits) < _MAX_DIGITS else float(digits)


def expected_string(value: Any) -> str:
    """The message for a value that should be a string."""
    return f"expected a string, found {'null' if value is None else type(value).__name__}"
