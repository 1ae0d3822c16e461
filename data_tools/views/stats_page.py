"""The report of `taco data stats` as text and bars, for any terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich.cells import set_cell_size

from pretrain.errors import counted

_BAR_COLUMNS = 40


def describe(report: dict[str, Any]) -> str:
    """The report of one dataset as lines of text."""
    documents, rows = report["tokens_per_document"], report["rows"]
    lines = [
        f"{report['prefix']}: {counted(report['documents'], 'document')}, {counted(report['tokens'], 'token')}, "
        f"{_bytes(report['bin_bytes'])} as {report['dtype']}",
        "",
        f"tokens per document: {_lengths(documents)}",
        *_histogram(documents["histogram"]),
    ]
    if report["tokens_per_sequence"] is not None:
        sentences = report["tokens_per_sequence"]
        lines += ["", f"{report['sequences']:,} sentences, tokens per sentence: {_lengths(sentences)}"]
        lines += _histogram(sentences["histogram"])
    lines += ["", *_vocabulary(report["vocabulary"])]
    if rows["modes"]:
        lines += ["", f"rows of {rows['seq_length']} tokens:"]
        lines += [
            f"  {mode:<9} {item['rows']:>13,} rows, {100 * item['text_share']:5.1f} % of their places hold text"
            + (f", {item['left_out']:,} tokens left out" if item["left_out"] else "")
            for mode, item in rows["modes"].items()
        ]
    if report["dropped"]:
        lines += ["", "left out by preprocessing:"]
        lines += [
            f"  {reason:<20} {item['documents']:>10,} document{'' if item['documents'] == 1 else 's'}"
            for reason, item in report["dropped"].items()
        ]
    return "\n".join(lines)


def _lengths(item: dict[str, Any]) -> str:
    shares = ", ".join(f"{share} % {length:,}" for share, length in item["percentiles"].items())
    first = f"mean {item['mean']:,.1f}, {item['min']:,} to {item['max']:,}, {item['empty']:,} empty"
    return f"{first}\n  percentiles: {shares}"


def _vocabulary(item: dict[str, Any]) -> list[str]:
    of = f" of {item['size']:,}" if item["size"] is not None else ""
    lines = [f"vocabulary: {item['used']:,}{of} ids occur, {item['used_once']:,} of them once"]
    if item["unknown_share"] is not None:
        others = {role: count for role, count in item["special_tokens"].items() if role != "unk" and count}
        inside = ", ".join(f"{count:,} {role}" for role, count in others.items()) or "none"
        lines.append(f"  unknown: {100 * item['unknown_share']:.3f} %; other special tokens in the text: {inside}")
    if item["pieces_per_word"] is not None:
        lines.append(f"  {item['pieces_per_word']:.3f} tokens per word")
    shares = ", ".join(f"{share} % of all tokens: {number:,} ids" for share, number in item["ids_for_share"].items())
    zipf = f", Zipf exponent {item['zipf_exponent']:.2f}" if item["zipf_exponent"] is not None else ""
    lines += [f"  {shares}", f"  {item['entropy_bits']:.2f} bits per token{zipf}", "  share of all tokens by rank:"]
    lines += _rank_bars(item)
    if item["top"]:
        lines += ["  most frequent, with their share in percent:", *_top_tokens(item["top"])]
    return lines


def _top_tokens(entries: list[dict[str, Any]]) -> list[str]:
    """Pieces in columns, ordered line by line."""
    cells = [f"{set_cell_size(_name(entry), 16)}{100 * entry['share']:6.2f}" for entry in entries]
    return ["    " + "   ".join(cells[first : first + 4]) for first in range(0, len(cells), 4)]


def _name(entry: dict[str, Any]) -> str:
    name = str(entry["id"]) if entry["piece"] is None else entry["piece"]
    return name if name.isprintable() and name else repr(name)


def _rank_bars(item: dict[str, Any]) -> list[str]:
    rows, before, first, used = [], 0.0, 1, item["used"]
    for rank, share in [*item["top_share"].items(), (used, 1.0)]:
        last = min(int(rank), used)
        if first <= last:
            rows.append((f"{first:,}-{last:,}" if last > first else f"{last:,}", share - before, ""))
        before, first = share, last + 1
    return _bars(rows)


def _histogram(bars: list[dict[str, Any]]) -> list[str]:
    documents, tokens = (max(sum(bar[key] for bar in bars), 1) for key in ("number", "tokens"))
    return _bars(
        (
            f"{bar['low']:,}-{bar['high']:,}" if bar["high"] > bar["low"] else f"{bar['low']:,}",
            bar["number"] / documents,
            f"{100 * bar['tokens'] / tokens:6.1f} % of all tokens",
        )
        for bar in bars
    )


def _bars(rows: Iterable[tuple[str, float, str]]) -> list[str]:
    """Lines of a label, the share in percent, a bar proportional to the share, and words."""
    rows = list(rows)
    if not rows:
        return []
    width, most = max(len(label) for label, _, _ in rows), max(share for _, share, _ in rows) or 1.0
    return [
        f"  {label:>{width}} {100 * share:6.2f} %  {_bar(share / most):<{_BAR_COLUMNS}}  {words}".rstrip()
        for label, share, words in rows
    ]


def _bar(share: float) -> str:
    """A bar of `share` (0 to 1) of the columns; with eighths of a block if the terminal can show them."""
    if not (sys.stdout.encoding or "").lower().startswith("utf"):
        return "#" * round(share * _BAR_COLUMNS)
    whole, eighths = divmod(round(share * _BAR_COLUMNS * 8), 8)
    return "█" * whole + (chr(0x2590 - eighths) if eighths else "")


def _bytes(number: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number} bytes"
