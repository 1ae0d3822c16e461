"""From the text of a value to the type that its key has.

A text is read as people mean it where only one reading is likely (`1e5` steps, `off` for a switch or as the name of a
policy), and refused with the text where it is not (`0100`, `1:30`, `true` for a number).
"""

from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Sequence as SequenceOf
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from pretrain.config.keys import section_at
from pretrain.config.paths import expand
from pretrain.config.problems import quote, show
from pretrain.config.sections import IS_PATH
from pretrain.config.yaml_tree import Node, Scalar, Sequence, Table

_SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_WHOLE = re.compile(r"[-+]?(?:\d+(?:_\d+)*|0x[0-9a-f]+|0o[0-7]+)", re.ASCII | re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?(?:\d+(?:_\d+)*\.?\d*|\.\d+)(?:e[-+]?\d+)?", re.ASCII | re.IGNORECASE)
_LEADING_ZERO = re.compile(r"[-+]?0_*\d", re.ASCII)
_NOT_FINITE = re.compile(r"[-+]?\.?(?:inf|infinity|nan)", re.IGNORECASE)
_WITH_COMMAS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+", re.ASCII)
_LONGEST_NUMBER = 40


class WrongValueError(Exception):
    """A text that the type of its key does not allow; `str` says what was expected and found."""


def read(node: Node, annotation: Any, key: str, *, is_path: bool = False) -> Any:
    """The value of `node` as `annotation` wants it.

    Raises:
        WrongValueError: it is something else.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    is_path = is_path or annotation is Path
    if origin is Annotated:
        return read(node, arguments[0], key, is_path=IS_PATH in arguments[1:])
    if origin in (Union, types.UnionType):
        return _read_union(node, arguments, key, is_path=is_path)
    if origin is tuple:
        return _read_list(node, arguments, key)
    if not isinstance(node, Scalar):
        raise WrongValueError(f"expected {_name_of(annotation)}, found {found(node)}")
    if origin is Literal:
        return _read_option(node, arguments)
    if node.is_null:
        home = "; ~ alone is nothing in YAML; write ~/ for the home folder" if is_path and node.text == "~" else ""
        raise WrongValueError(f"expected {_name_of(annotation)}, found nothing{home}")
    if annotation is bool:
        return read_switch(node)
    if annotation is int:
        return read_whole(node.text)
    if annotation is float:
        return read_number(node.text)
    text = read_path(node) if is_path else node.text
    return Path(text) if annotation is Path else text


def read_switch(node: Scalar) -> bool:
    """True or false, also written as yes, no, on or off.

    Raises:
        WrongValueError: it is something else.
    """
    value = _SWITCHES.get(node.text.lower())
    if value is None:
        raise WrongValueError(f"expected true or false, found {quote(node.text)}")
    return value


def read_whole(text: str) -> int:
    """A whole number: 100000, 100_000, 1e5, 0x186a0.

    Raises:
        WrongValueError: it is something else, or has a leading zero.
    """
    if len(text) > _LONGEST_NUMBER or not (_WHOLE.fullmatch(text) or _NUMBER.fullmatch(text)):
        raise WrongValueError(f"expected a whole number, found {quote(text)}{_number_hint(text)}")
    _refuse_leading_zero(text, "a whole number")
    if _WHOLE.fullmatch(text):
        return _bounded(int(text, 0), text)
    number = Decimal(text.replace("_", ""))
    if not number or number.adjusted() > _LONGEST_NUMBER or number != number.to_integral_value():
        if not number:
            return 0
        raise WrongValueError(f"expected a whole number, found {quote(text)}")
    return _bounded(int(number), text)


def _bounded(number: int, text: str) -> int:
    if abs(number) >= 2**63:  # what datasets, order and random numbers count with
        raise WrongValueError(f"expected a whole number below 2^63, found {quote(text)}")
    return number


def read_number(text: str) -> float:
    """A number: 0.0001, 1e-4, .5, 3.

    Raises:
        WrongValueError: it is something else, has a leading zero, or is not finite.
    """
    if _NOT_FINITE.fullmatch(text):
        raise WrongValueError(f"expected a finite number, found {quote(text)}")
    if len(text) > _LONGEST_NUMBER or not (_WHOLE.fullmatch(text) or _NUMBER.fullmatch(text)):
        raise WrongValueError(f"expected a number, found {quote(text)}{_number_hint(text)}")
    _refuse_leading_zero(text, "a number")
    value = float(int(text, 0)) if _WHOLE.fullmatch(text) else float(text)
    if not math.isfinite(value):
        raise WrongValueError(f"expected a finite number, found {quote(text)}, which is too large")
    return value


def read_path(node: Scalar) -> str:
    """A path, with `~` and variables expanded.

    Raises:
        WrongValueError: it is empty or holds NUL, or what it refers to does not exist.
    """
    if not node.text or "\0" in node.text:
        raise WrongValueError(f"expected a path, found {quote(node.text)}")
    if node.is_literal:
        return node.text
    try:
        return expand(node.text)
    except ValueError as error:
        raise WrongValueError(f"found {quote(node.text)}, but {error}") from None


def read_anything(node: Node) -> Any:
    """The value of a node whose type is not known, as YAML 1.2 reads it: null, true, false, numbers, else text."""
    if isinstance(node, Table):
        return {key: read_anything(entry) for key, entry in node.entries.items()}
    if isinstance(node, Sequence):
        return [read_anything(item) for item in node.items]
    if node.is_quoted:
        return node.text
    if node.is_null:
        return None
    if node.text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return read_switch(node)
    for reader in (read_whole, read_number) if "." not in node.text else (read_number,):
        try:
            return reader(node.text)
        except WrongValueError:
            continue
    return node.text


def _read_union(node: Node, annotations: SequenceOf[Any], key: str, *, is_path: bool) -> Any:
    """The first of several types that fits: nothing, an option, then the rest."""
    rest = [annotation for annotation in annotations if annotation is not types.NoneType]
    if len(rest) < len(annotations) and is_null(node):
        return None
    options = [option for annotation in rest if get_origin(annotation) is Literal for option in get_args(annotation)]
    if isinstance(node, Scalar) and node.text in options:
        return node.text
    others = [annotation for annotation in rest if get_origin(annotation) is not Literal]
    try:
        return read(node, others[0], key, is_path=is_path)
    except WrongValueError as error:
        hints = [repr(option) for option in options]
        if isinstance(node, Scalar) and node.text.lower() in ("none", "nothing", "off", "never", "false", "no"):
            hints += ["null for nothing"] if len(rest) < len(annotations) else []
        remedy = f"; or write {' or '.join(hints)}" if hints else ""
        raise WrongValueError(f"{error}{remedy}") from None


def _read_list(node: Node, arguments: tuple[Any, ...], key: str) -> tuple[Any, ...]:
    is_open = arguments[-1] is Ellipsis
    element = arguments[0]
    if isinstance(node, Table):
        raise WrongValueError(f"expected a list, found keys; write the whole list, {example(key)}")
    if isinstance(node, Scalar):
        if node.is_null:
            if _default_of(key) == ():
                return ()
            raise WrongValueError(f"expected a list, found nothing; write {example(key)}")
        own = node.text if is_open and re.fullmatch(r"[\w./~$+, -]+", node.text) else None
        remedy = f"'{key}=[{own}]'" if own else example(key)
        raise WrongValueError(f"expected a list, found {quote(node.text)}; write {remedy}")
    if not is_open and len(node.items) != len(arguments):
        raise WrongValueError(f"expected a list of {len(arguments)}, found {len(node.items)}; write {example(key)}")
    return tuple(read(item, element if is_open else arguments[place], key) for place, item in enumerate(node.items))


def example(key: str) -> str:
    """An override of the key that can be read, as a shell takes it: its default, or something of the right shape."""
    default, field = _default_of(key), _field_of(key)
    if isinstance(default, tuple) and default:
        return f"'{key}=[{', '.join(str(item) for item in default)}]'"
    is_list = field is not None and "tuple" in str(field.annotation)
    return f"'{key}=[FIRST, SECOND]'" if is_list else f"{key}=VALUE"


def _field_of(key: str) -> FieldInfo | None:
    section, _, name = key.rpartition(".")
    owner = section_at(section)
    return owner.model_fields.get(name) if owner else None


def _default_of(key: str) -> Any:
    field = _field_of(key)
    return None if field is None else field.default


def _read_option(node: Scalar, options: tuple[Any, ...]) -> Any:
    for option in options:
        if isinstance(option, int):
            if not node.is_null and _is_whole(node.text) and read_whole(node.text) == option:
                return option
        elif node.text == option:
            return option
    shown = [repr(option) for option in options]
    near = difflib.get_close_matches(node.text.lower(), [str(option) for option in options], n=1)
    hint = f"; did you mean {near[0]}?" if near and node.text not in options else ""
    found = "nothing" if node.is_null else quote(node.text)
    raise WrongValueError(f"expected {', '.join(shown[:-1])} or {shown[-1]}, found {found}{hint}")


def _is_whole(text: str) -> bool:
    return bool(re.fullmatch(r"0|[1-9]\d*", text, re.ASCII))


def _refuse_leading_zero(text: str, expected: str) -> None:
    if _LEADING_ZERO.match(text):
        sign = text[0] if text[0] in "+-" else ""
        plain = sign + text.lstrip("+-").replace("_", "").lstrip("0")
        raise WrongValueError(
            f"expected {expected}, found {quote(text)}: a leading zero is octal to some programs; write "
            f"{plain if plain.strip('+-')[:1].isdigit() else sign + '0' + plain.strip('+-')}"
        )


def _number_hint(text: str) -> str:
    if _WITH_COMMAS.fullmatch(text):
        return f"; write {text.replace(',', '')}"
    if ":" in text and re.fullmatch(r"[\d:]+", text, re.ASCII):
        return "; it is no time of day, write the number itself"
    return ""


def _name_of(annotation: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", Path: "a path", str: "text"}
    if get_origin(annotation) is Literal:
        return " or ".join(repr(option) for option in get_args(annotation))
    return names.get(annotation, "a value")


def found(node: Node) -> str:
    """What a message says instead of the node."""
    if isinstance(node, Table):
        return f"keys ({', '.join(show(key) for key in list(node.entries)[:3])})" if node.entries else "an empty table"
    if isinstance(node, Sequence):
        return f"a list of {len(node.items)}"
    return "nothing" if node.is_null else quote(node.text)


def is_null(node: Node) -> bool:
    """True for nothing at all."""
    return isinstance(node, Scalar) and node.is_null
