"""Writes csrc/text/unicode_tables.hpp, beside this file: what the installed `tokenizers` does with each code point.

The source is the library, not a Unicode database: its normalizer and pre-tokenizer follow several versions of Unicode
at once, and ids are right only if we do the same. Run it from the root after a change of that library's version:

    python csrc/text/generate_unicode_tables.py [--check]

`--check` writes nothing and exits with 1 if the file differs from the result for the installed library.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tokenizers import normalizers, pre_tokenizers

TARGET = Path(__file__).with_name("unicode_tables.hpp")
HIGHEST = "\u0345"  # the mark of the highest combining class: every other mark moves before it
HANGUL = range(0xAC00, 0xAC00 + 11172)
HEADER = """\
// Written by csrc/text/generate_unicode_tables.py from the `tokenizers` library; run it again instead of editing this.
// The tables are explained in csrc/text/unicode.hpp.
// clang-format off
#pragma once

#include <cstdint>

namespace taco::tables {

struct Range {
  uint32_t first, last;
};
struct MarkRange {
  uint32_t first, last;
  uint8_t combining_class;
};
struct Change {
  uint32_t from, to[3];
};
// from, from + step, ... up to last, each replaced by itself + delta.
struct Shift {
  uint32_t from, last, step;
  int32_t delta;
};
"""


def code_points() -> Iterator[int]:
    """All code points that a text can contain: no surrogates."""
    yield from range(0xD800)
    yield from range(0xE000, 0x110000)


def split_forms(*, lowercase: bool) -> dict[int, str]:
    """By code point, what remains of it after both steps, with a space for each word boundary."""
    normalize = normalizers.BertNormalizer(lowercase=lowercase).normalize_str
    split = pre_tokenizers.BertPreTokenizer().pre_tokenize_str
    return {
        code: " ".join(word for word, _ in split("a" + normalize(chr(code)) + "a"))[1:-1]  # between two letters
        for code in code_points()
    }


def mark_classes(uncased: dict[int, str]) -> dict[int, int]:
    """Canonical combining class of the marks that are kept in uncased text, and so can be reordered."""
    decompose: Callable[[str], str] = normalizers.NFD().normalize_str
    kept = [mark for code, mark in uncased.items() if mark == chr(code) and decompose(HIGHEST + mark)[0] != HIGHEST]
    known = [chr(code) for code in code_points() if decompose(HIGHEST + chr(code))[0] != HIGHEST]
    probes = {unicodedata.combining(mark): mark for mark in [*known, HIGHEST] if unicodedata.combining(mark)}
    return {ord(mark): _class_of(mark, probes, decompose) for mark in kept}


def is_barrier(accent: str) -> bool:
    """Whether part of an accent has the combining class 0, so that no mark moves past it before it is removed."""
    decompose: Callable[[str], str] = normalizers.NFD().normalize_str
    return any(part != HIGHEST and decompose(HIGHEST + part)[0] == HIGHEST for part in decompose(accent))


def _class_of(mark: str, probes: dict[int, str], decompose: Callable[[str], str]) -> int:
    """The class of the only probe that the library leaves on either side of `mark`."""
    equal = [
        combining_class
        for combining_class, probe in probes.items()
        if decompose(probe + mark) == probe + mark and decompose(mark + probe) == mark + probe
    ]
    if len(equal) != 1:
        raise SystemExit(f"U+{ord(mark):04X}: its combining class cannot be found; candidates {equal}")
    return equal[0]


def to_ranges(codes: Iterable[int]) -> list[tuple[int, int]]:
    """First and last of each run of adjacent code points; the gap of the surrogates ends no run."""
    ranges: list[tuple[int, int]] = []
    for code in codes:
        if ranges and ranges[-1][1] in (code - 1, 0xD7FF if code == 0xE000 else code - 1):
            ranges[-1] = (ranges[-1][0], code)
        else:
            ranges.append((code, code))
    return ranges


def to_shifts(changes: dict[int, int]) -> list[tuple[int, int, int, int]]:
    """(from, last, step, delta) of evenly spaced code points with the same difference to their replacement."""
    shifts: list[tuple[int, int, int, int]] = []
    for code, target in changes.items():
        delta = target - code
        if shifts and shifts[-1][3] == delta:
            first, last, step, _ = shifts[-1]
            if code - last in ((1, 2) if first == last else (step,)):
                shifts[-1] = (first, code, code - last, delta)
                continue
        shifts.append((code, code, 1, delta))
    return shifts


def table(kind: str, name: str, rows: Iterable[Iterable[int]]) -> str:
    """A C++ array, with as many rows per line as fit."""
    text = f"\nconstexpr {kind} {name}[] = {{\n"
    line = "   "
    for row in rows:
        item = " {" + ", ".join(f"0x{value:X}" if value > 0xFF else str(value) for value in row) + "},"
        if len(line) + len(item) > 120:
            text, line = text + line + "\n", "   "
        line += item
    return f"{text}{line}\n}};\n"


def generate() -> str:
    """The text of unicode_tables.hpp for the installed library."""
    cased, uncased = split_forms(lowercase=False), split_forms(lowercase=True)
    isolated = {code for code, form in cased.items() if form == f" {chr(code)} "}
    if any(form not in ("", " ", chr(code)) for code, form in cased.items() if code not in isolated):
        raise SystemExit("the cased normalizer replaces characters now; the tables have no place for that")
    changes: dict[int, list[int]] = {}
    for code, form in uncased.items():
        if form not in ("", cased[code]) and code not in HANGUL:
            changes[code] = [ord(character) for character in form.replace(" ", "")]
            # A replacement is scanned like text, so its boundaries must follow from its characters.
            if form != "".join(uncased[target] for target in changes[code]):
                raise SystemExit(f"U+{code:04X} becomes {form!r}; the tables cannot say that")
    single = {code: targets[0] for code, targets in changes.items() if len(targets) == 1}
    shifts = [shift for shift in to_shifts(single) if shift[0] != shift[1]]
    shifted = {code for first, last, step, _ in shifts for code in range(first, last + 1, step)}
    listed = [(code, *targets) for code, targets in changes.items() if code not in shifted]
    stripped = [code for code, form in uncased.items() if not form and cased[code]]
    barriers = [code for code in stripped if is_barrier(chr(code))]
    marks: list[tuple[int, int, int]] = []
    for code, combining_class in sorted(mark_classes(uncased).items()):
        if marks and marks[-1][1:] == (code - 1, combining_class):
            marks[-1] = (marks[-1][0], code, combining_class)
        else:
            marks.append((code, code, combining_class))
    return (
        HEADER
        + table("Range", "kRemoved", to_ranges(code for code, form in cased.items() if not form))
        + table("Range", "kSpaces", to_ranges(code for code, form in cased.items() if form == " "))
        + table("Range", "kIsolated", to_ranges(sorted(isolated)))
        + table("Range", "kStripped", to_ranges(sorted({*stripped} - {*barriers})))
        + table("Range", "kBarriers", to_ranges(barriers))
        + table("MarkRange", "kMarks", marks)
        + table("Shift", "kShifts", shifts)
        + table("Change", "kChanges", listed)
        + "\n}  // namespace taco::tables\n"
    )


def main() -> None:
    text = generate()
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(text, encoding="utf-8")
    elif TARGET.read_text(encoding="utf-8") != text:
        raise SystemExit(f"{TARGET} differs from the installed tokenizers library; run this without --check")


if __name__ == "__main__":
    main()
