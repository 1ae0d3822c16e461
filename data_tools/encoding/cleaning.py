"""Cleans texts before tokenisation: Unicode normalisation, control characters, whitespace, and length limits.

Between the readers and the tokenizer. By default nothing is done, since every tokenizer normalises by its own rules.
Every dropped text has a reason, so that counts add up.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from pretrain.data.dataset.manifest import Dropped
from pretrain.errors import ConfigError

Normalize = Literal["none", "nfc", "nfkc"]
ControlCharacters = Literal["keep", "space", "drop"]
# Reasons, as written in reports and manifests.
EMPTY, TOO_SHORT, TOO_LONG = "empty", "too_short", "too_long"
CONTROL_CHARACTERS, TOO_MANY_MARKS = "control_characters", "too_many_marks"
NO_TOKENS, TOO_FEW_TOKENS, TOO_MANY_TOKENS = "no_tokens", "too_few_tokens", "too_many_tokens"

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
# Control characters that are not whitespace either.
_GARBAGE = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")
_PARAGRAPH = re.compile("\n\\s*\n|\u2029")
# Normalisation sorts the marks of a letter in quadratic time; Unicode's stream-safe format allows 30.
_MAX_MARKS = 1000
# Not marks, but normalisation turns them into marks (Tibetan vowels, half-width voicing).
_BECOME_MARKS = "\u0f73\u0f75\u0f81\uff9e\uff9f"


@dataclass(frozen=True)
class CleaningOptions:
    """How texts are cleaned, and which are dropped; the default does nothing. Frozen and picklable.

    `normalize`: Unicode normalisation. `control_characters`: "space" replaces each character of category Cc except tab,
    line feed and carriage return by a space; "drop" drops texts that contain one that is not whitespace.
    `fold_whitespace`: replaces every run of whitespace by one space, and every paragraph break by one blank line.
    `min_chars`, `max_chars`: characters of the cleaned text. `min_tokens`, `max_tokens`: tokens of a document. None
    means no upper limit. `split_sentences`: documents are written sentence by sentence.
    """

    normalize: Normalize = "none"
    control_characters: ControlCharacters = "keep"
    fold_whitespace: bool = False
    min_chars: int = 0
    max_chars: int | None = None
    min_tokens: int = 0
    max_tokens: int | None = None
    split_sentences: bool = False

    def __post_init__(self) -> None:
        """Raises ConfigError: a value is invalid."""
        for name, choices in (("normalize", get_args(Normalize)), ("control_characters", get_args(ControlCharacters))):
            if getattr(self, name) not in choices:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} {getattr(self, name)}: expected one of {', '.join(choices)}")
        _check_limits("chars", self.min_chars, self.max_chars)
        _check_limits("tokens", self.min_tokens, self.max_tokens)


def clean(texts: Sequence[str], options: CleaningOptions) -> tuple[list[str], list[str | None]]:
    """The cleaned texts to keep, in order, and for each of `texts` the reason why it was dropped, or None.

    Reasons are "empty" (only whitespace), "control_characters", "too_many_marks" (more than 1,000 combining marks in a
    row, if texts are normalised), "too_short" and "too_long".
    """
    steps = _steps(options)
    limits = options.min_chars > 0 or options.max_chars is not None
    kept: list[str] = []
    reasons: list[str | None] = []
    for text in texts:
        reason = _fault(text, options)
        if reason is None:
            for step in steps:
                text = step(text)
            # With spaces instead of control characters a text may be only whitespace.
            reason = EMPTY if not text or text.isspace() else _length_fault(text, options) if limits else None
        if reason is None:
            kept.append(text)
        reasons.append(reason)
    return kept, reasons


def drop_by_tokens(num_tokens: np.ndarray, options: CleaningOptions) -> dict[str, np.ndarray]:
    """Which documents (bool [num_documents]) are dropped for each reason, by their numbers of tokens.

    Reasons are "no_tokens", "too_few_tokens" and "too_many_tokens"; no document has two. Reasons without documents are
    left out.
    """
    is_empty = num_tokens == 0
    masks = {NO_TOKENS: is_empty, TOO_FEW_TOKENS: ~is_empty & (num_tokens < options.min_tokens)}
    if options.max_tokens is not None:
        masks[TOO_MANY_TOKENS] = num_tokens > options.max_tokens
    return {reason: mask for reason, mask in masks.items() if mask.any()}


def count_dropped(texts: Sequence[str], reasons: Sequence[str | None]) -> dict[str, Dropped]:
    """Documents and UTF-8 bytes (before cleaning) by reason."""
    counts: dict[str, list[int]] = {}
    for text, reason in zip(texts, reasons, strict=True):
        if reason is not None:
            count = counts.setdefault(reason, [0, 0])
            count[0] += 1
            count[1] += len(text) if text.isascii() else len(text.encode())
    return {reason: Dropped(documents=number, bytes=size) for reason, (number, size) in counts.items()}


def _check_limits(unit: str, low: int, high: int | None) -> None:
    if low < 0:
        raise ConfigError(f"--min-{unit} {low}: expected 0 or more")
    if high is not None and high < max(low, 1):
        raise ConfigError(
            f"--max-{unit} {high}: expected at least --min-{unit} ({low}) and 1, or every text is dropped"
        )


def _steps(options: CleaningOptions) -> list[Callable[[str], str]]:
    steps: list[Callable[[str], str]] = []
    if options.normalize != "none":
        steps.append(_to_nfc if options.normalize == "nfc" else _to_nfkc)
    if options.control_characters == "space":
        steps.append(_replace_controls)
    if options.fold_whitespace:
        steps.append(_fold_whitespace)
    return steps


def _fault(text: str, options: CleaningOptions) -> str | None:
    if not text or text.isspace():
        return EMPTY
    if options.control_characters == "drop" and _GARBAGE.search(text):
        return CONTROL_CHARACTERS
    if options.normalize != "none" and _has_many_marks(text):
        return TOO_MANY_MARKS
    return None


def _length_fault(text: str, options: CleaningOptions) -> str | None:
    if len(text) < options.min_chars:
        return TOO_SHORT
    if options.max_chars is not None and len(text) > options.max_chars:
        return TOO_LONG
    return None


# Each step checks first, which is fast; most texts need no change and are not copied.


def _to_nfc(text: str) -> str:
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def _to_nfkc(text: str) -> str:
    return text if unicodedata.is_normalized("NFKC", text) else unicodedata.normalize("NFKC", text)


def _replace_controls(text: str) -> str:
    return _CONTROL.sub(" ", text) if _CONTROL.search(text) else text


def _fold_whitespace(text: str) -> str:
    paragraphs = (" ".join(paragraph.split()) for paragraph in _PARAGRAPH.split(text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _has_many_marks(text: str) -> bool:
    """Whether there are more than _MAX_MARKS marks in a row; every such run covers one of the sampled positions."""
    if len(text) <= _MAX_MARKS or text.isascii():
        return False
    return any(
        _is_mark(mark) and _marks_around(text, (number + 1) * _MAX_MARKS - 1) > _MAX_MARKS
        for number, mark in enumerate(text[_MAX_MARKS - 1 :: _MAX_MARKS])
    )


def _marks_around(text: str, at: int) -> int:
    """The length of the run of marks around the one at `at`; counting stops when there are too many."""
    end = at
    while end < len(text) and end - at <= _MAX_MARKS and _is_mark(text[end]):
        end += 1
    first = at
    while first > 0 and end - first <= _MAX_MARKS and _is_mark(text[first - 1]):
        first -= 1
    return end - first


def _is_mark(character: str) -> bool:
    return unicodedata.combining(character) > 0 or character in _BECOME_MARKS
